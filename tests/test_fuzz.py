"""A fixed small part of the fuzzing of `fuzz.py`, and what shows that it finds what there is to find.

`python tests/fuzz.py --minutes 30` does more of it."""

import os
import time

import fuzz
import pytest
from fuzz import Process, Reader, damage_bytes

CASES = {
    "image": 40, "faces": 10, "table": 100, "store": 30, "shards": 10, "published": 20, "model": 30, "arrays": 20,
    "weights": 2, "checkpoint": 25, "runs": 40, "report": 20,
}


@pytest.fixture(scope="module")
def process():
    with Process() as process:
        yield process


@pytest.mark.parametrize("kind", CASES)
def test_a_damaged_file_ends_clean_or_in_a_sentence(process, kind):
    found = [process(kind, seed) for seed in range(CASES[kind])]
    wrong = [one for one in found if one["verdict"] not in ("clean", "sentence")]
    assert not wrong, f"python tests/fuzz.py --case {kind} {wrong[0]['seed']}: {wrong[0]}"
    assert any(one["verdict"] == "sentence" for one in found)  # damage is noticed


@pytest.mark.parametrize("kind", CASES)
def test_files_that_are_not_damaged_are_read(process, kind):
    found = process(kind, fuzz.WHOLE)
    assert found["verdict"] == "clean", found


# Readers that fail in every way there is


def plain(folder):
    (folder / "plain.txt").write_text("something to be damaged" * 9)


def crash(case):
    os.abort()


def leave(case):
    raise SystemExit(0)


def wait(case):
    time.sleep(60)


def compute(case):
    end = time.process_time() + 1
    while time.process_time() < end:
        pass


def take(case):
    return bytearray(b"x" * 200_000_000)


def take_all(case):
    return bytearray(2 * fuzz.ADDRESSES)


def name_nothing(case):
    raise ValueError("it is not what it should be")


def say_nothing(case):
    raise ValueError(f"{case.victim}")


def say_much(case):
    raise ValueError(f"{case.victim} is not what it\nshould be")


def fail(case):
    return {}[case.victim]


def refuse(case):
    raise ValueError(f"{case.victim} is not what it should be")


def accept(case):
    return case.victim.read_bytes()


FAILURES = {
    crash: "crash (-6)", leave: "SystemExit in test_fuzz.leave", wait: "no answer in 5 s", compute: "slow",
    take: "hungry", take_all: "MemoryError in test_fuzz.take_all", fail: "KeyError in test_fuzz.fail",
    name_nothing: "names no file (ValueError) in test_fuzz.name_nothing",
    say_nothing: "no sentence (ValueError) in test_fuzz.say_nothing",
    say_much: "several lines (ValueError) in test_fuzz.say_much", refuse: "sentence", accept: "clean",
}
IMPORTS = ()
READERS = {
    read.__name__: Reader(
        plain, read, ("*.txt",), (damage_bytes,), seconds=0.5 if read is compute else 60, megabytes=100
    )
    for read in FAILURES
}


def test_every_kind_of_failure_is_found_and_the_next_case_is_done():
    with Process("test_fuzz", standstill=5) as process:
        found = {read: process(read.__name__, 1)["verdict"] for read in FAILURES}
    assert list(found.items()) == list(FAILURES.items())


def test_a_case_is_the_same_again(tmp_path, monkeypatch):
    "Whichever process makes it, and whatever cases came before."
    contents = []
    for place, seeds in (("one", (3,)), ("two", (1, 2, 3))):
        monkeypatch.setenv("FACESR_FUZZ", str(tmp_path / place))
        (tmp_path / place).mkdir()
        for kind in ("image", "table", "store", "model"):
            cases = [fuzz.prepared(kind, seed, fuzz.READERS) for seed in seeds]
            contents.append((cases[-1].victim.name, cases[-1].victim.read_bytes()))
    assert contents[:4] == contents[4:]


@pytest.mark.parametrize("damage", [*fuzz.BYTES])
def test_bytes_are_damaged(damage):
    content = bytes(range(256)) * 40
    damaged = [bytearray(content) for _ in range(20)]
    for seed, one in enumerate(damaged):
        damage(fuzz.random.Random(seed), one)
    assert sum(one != content for one in damaged) >= 15
