"""A run that is killed while it is published is completed by the next start, to the same bits.

The file is also the program that the tests start: `python tests/test_publication.py FOLDER` trains one small run, and
then finishes copies of it in processes that die at their first file operation, at the second, and so on. Measuring is
what takes time in `finish` and touches no file, so it is done once and handed to all of them."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest

ROOT = Path(__file__).parent.parent
RUN = Path("smoke", "baseline", "seed0")
OPERATIONS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")
ALIKE = ("model.safetensors", "per_image.csv", "history.csv", "metrics.json", "shown.webp", "progress.webp")


def changes_a_file(event, arguments):
    "Whether Python is about to do so; opening a lock, which the system lifts, counts as well."
    if event == "open":
        flags = arguments[2]
        return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return event in OPERATIONS


def die_at(last):
    "This process is killed when it is about to do its file operation of that number."
    numbers = count(1)

    def hook(event, arguments):
        if changes_a_file(event, arguments) and next(numbers) == last:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def ended(work):
    "How a process ends that does this work: its exit status, negative where a signal killed it."
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def make_and_kill(folder):
    "Prints a JSON line for every number of operations: of a run by its notebook, and of the publication without one."
    import nbformat
    import torch

    from facesr import execution, training
    from facesr.study import resolve

    torch.set_num_threads(1)  # a forked process has none of its parent's other threads
    config = resolve(preset="smoke", epochs=1, perceptual_weight=0)
    trainer = training.Trainer(config, None, folder / "made", lambda line: None)
    training.fit(trainer)
    shutil.copytree(folder / "made", folder / "fitted")
    table = training.finish(trainer)
    faces, shown = (trainer.faces, trainer.pixels), (folder / "made" / RUN / "shown.webp").read_bytes()
    metrics = json.loads((folder / "made" / RUN / "metrics.json").read_text())

    def prepared(out, notebook):
        again = training.Trainer(config, None, out, lambda line: None)
        training.fit(again)
        training.finish(again, notebook)

    def in_a_notebook(source, executed, parameters):
        from facesr.runs import write_atomically

        write_atomically(executed, "as papermill leaves it")
        prepared(source.parent / parameters["out"], parameters["kept"])
        return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("what happened", id="one")])

    def by_study(out):
        execution.run_notebook("baseline", "smoke", 0, None, out, ROOT / "nbs")

    def by_train(out):
        training.train(config, None, out, lambda line: None)

    def killed_in_publish(out, last, publish=training.publish):
        "All before it is the same for both."
        with patch.object(training, "publish", lambda *a: (die_at(last), publish(*a))):
            by_train(out)

    class Picture:
        def savefig(self, buffer, **how):
            buffer.write(b"a picture")

    known = {
        "read_faces": lambda *a: faces,
        "evaluate": lambda *a: table.drop(columns="person"),
        "Evaluator": lambda *a, **b: SimpleNamespace(grid=lambda: metrics["grid"]),
        "shown_outputs": lambda *a: shown,
        "shown_record": lambda *a: metrics["shown"],
        "summarise": lambda *a: metrics["test"],
        "gmac": lambda model: 0.0,
        "progress_figure": lambda trainer: Picture(),
        "provenance": lambda provenance=trainer.provenance: dict(provenance),
    }
    settings = {"execute": in_a_notebook, "resolve": lambda *a, **b: config}
    with patch.multiple(training, **known), patch.multiple(execution, **settings), open(os.devnull, "w") as nowhere:
        said, sys.stdout = sys.stdout, nowhere
        ways = {
            "study": (lambda out, last: (die_at(last), by_study(out)), by_study),
            "train": (killed_in_publish, by_train),
        }
        for way, (make_and_die, make) in ways.items():
            for last in count(1):
                out = folder / way / str(last)
                shutil.copytree(folder / "fitted", out)
                first = ended(lambda: make_and_die(out, last))
                after = sorted(str(path.relative_to(out / RUN)) for path in (out / RUN).rglob("*"))
                then = ended(lambda: make(out))
                print(json.dumps({"way": way, "last": last, "first": first, "then": then, "after": after}), file=said)
                if first == 0:
                    break


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    "The folder in which all of it happened, and what was noted."
    folder = tmp_path_factory.mktemp("killed")
    environment = {name: value for name, value in os.environ.items() if name != "FACESR_CELEBA"}
    environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    program = [sys.executable, __file__, str(folder)]
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder, [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("way", ["study", "train"])
def test_a_run_that_is_killed_at_any_file_operation_is_completed_by_the_next_start(killed, way):
    folder, noted = killed
    noted = [note for note in noted if note["way"] == way]
    assert len(noted) > {"study": 40, "train": 10}[way] and noted[-1]["first"] == 0
    assert {note["first"] for note in noted[:-1]} == {-signal.SIGKILL}
    assert [note for note in noted if note["then"] != 0] == []
    whole = folder / way / str(noted[-1]["last"]) / RUN  # which nothing disturbed
    names = {*ALIKE, "config.json", "checkpoint"} | ({"train.ipynb"} if way == "study" else set())
    assert {path.name for path in whole.iterdir()} == names
    for note in noted:
        run = folder / way / str(note["last"]) / RUN
        assert {path.name for path in run.iterdir()} == names, note
        work = {path.name for path in (run / "checkpoint").iterdir()} - {"lock", "train.ipynb"}
        assert work == {"complete"}, note
        for name in names - {"checkpoint"}:
            assert (run / name).read_bytes() == (whole / name).read_bytes(), (note, name)


def test_a_run_of_a_study_is_complete_with_its_notebook_and_not_before(killed):
    _, noted = killed
    complete = [note for note in noted if note["way"] == "study" and "checkpoint/complete" in note["after"]]
    assert complete and all("train.ipynb" in note["after"] for note in complete)
    waiting = [note for note in noted if note["way"] == "study" and "metrics.json" in note["after"]]
    assert any("train.ipynb" not in note["after"] for note in waiting)  # the kill came in between, and cost nothing


# Files that are written


def test_writers_of_one_file_do_not_meet(tmp_path):
    from facesr.runs import write_atomically

    contents = [bytes([i]) * 500_000 for i in range(8)]
    with ThreadPoolExecutor(24) as writers:
        list(writers.map(lambda content: write_atomically(tmp_path / "file", content), contents * 3))
    assert (tmp_path / "file").read_bytes() in contents and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_device_is_no_place_for_a_file(tmp_path):
    "Nobody but root may make a device node, so one that is there anyway is named through a link, too."
    from facesr.runs import write_atomically

    (tmp_path / "link").symlink_to(os.devnull)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("link", "pipe", "folder"):
        with pytest.raises(OSError, match=f"{name} is (a folder|no regular file)"):
            write_atomically(tmp_path / name, "")
    with pytest.raises(OSError, match="null is no regular file"):
        write_atomically(Path(os.devnull), "")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode) and (tmp_path / "pipe").is_fifo()


# Parameters of train.ipynb


def given(**parameters):
    "What the notebook makes of them: its first cells are run, with the parameters where papermill puts them."
    from facesr.runs import default_out

    notebook = json.loads((ROOT / "nbs" / "train.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"][:3]
    imports, defaults, configuration = ("".join(cell["source"]).replace("%matplotlib inline", "") for cell in code)
    injected = "\n".join(["# Parameters", *(f"{name} = {value!r}" for name, value in parameters.items())])
    assert code[1]["metadata"]["tags"] == ["parameters"]
    namespace = {"In": [imports, defaults, injected, configuration]}
    exec("\n".join(namespace["In"]), namespace)
    place = "default" if namespace["place"] == default_out() else namespace["place"]
    return namespace["faces"], place, namespace["anew"], namespace["keep"]


def test_parameters_of_the_notebook_are_what_is_meant():
    assert given() == (None, "default", False, False)
    assert given(out=2024, data=7) == (Path("7"), Path("2024"), False, False)
    assert given(out="~/tries", again="True", kept="no") == (None, Path.home() / "tries", True, False)
    assert given(again="false", kept=1)[2:] == (False, True)


@pytest.mark.parametrize(
    "name, value, sentence",
    [
        ("again", "maybe", "again is 'maybe'; allowed are true and false"),
        ("out", ["a", "b"], "it has to be the name of a folder"),
        ("out", " ", "it has to be the name of a folder"),
        ("data", 1.5, "it has to be the name of a folder"),
        ("variant", ["deep"], "variant is ['deep']; input should be a valid string"),
        ("variant", "depe", "variant is 'depe'; allowed are"),
        (
            "preset", "fast",
            "preset is 'fast'; allowed are smoke, quick, celeba, seeds, rules, own, faithful, sharp, photographs",
        ),
        ("width", 30, "width is 30"),
        ("seed", 2**63, "seed is 9223372036854775808; input should be less than 9223372036854775808"),
        ("seed", [0], "seed is [0]; input should be a valid integer"),
    ],
)
def test_parameters_of_the_notebook_that_mean_nothing_are_refused(name, value, sentence):
    with pytest.raises(ValueError) as refused:
        given(**{name: value})
    assert sentence in str(refused.value)


if __name__ == "__main__":
    make_and_kill(Path(sys.argv[1]))
