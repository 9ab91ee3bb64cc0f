"A store on a bad day: bytes that changed, columns that are odd, other files' rows, a full disk, a file in use."

import multiprocessing
import os
import resource
import shlex
import shutil
import subprocess
import sys
from functools import partial

import h5py
import numpy as np
import pytest
import torch
from conftest import forked
from test_heatmaps import FACES, FixedBoxes, make, NAMES, RECIPE
from typer.testing import CliRunner

from facesr.cli import heatmaps_app
from facesr.detection import bundled_detector
from facesr.faces import read_pixels
from facesr.heatmaps import Recipe
from facesr.store import export_published, HeatmapStore, import_published, make_heatmaps, read_names


PIXELS = read_pixels(FACES.images, NAMES[:6]).levels[128]


def quiet(line):
    pass


# Damaged bytes


def read_with_a_flipped_byte(path, whole, place):
    "What a store says in which one byte was changed; a new file, since HDF5 remembers files that are open."
    content = bytearray(whole)
    content[place] ^= 0x55
    path.write_bytes(content)
    try:
        store = HeatmapStore(path)
        store.check(NAMES[:6], PIXELS)
        return store.maps(NAMES[:6]).tolist(), store.empty, store.counts.tolist(), store.settings
    finally:
        path.unlink()


@pytest.mark.parametrize("part", ["start", "end", "anywhere"])
def test_a_damaged_byte_never_reads_as_something_else(tmp_path, part):
    "Wherever it is: what is read is what was written, or a sentence says that it cannot be read."
    path = tmp_path / "store.h5"
    store = make(path, NAMES[:6])
    whole = path.read_bytes()
    says = store.maps(NAMES[:6]).tolist(), store.empty, store.counts.tolist(), store.settings
    size, refused = len(whole), 0
    places = {"start": range(0, 2_400, 7), "end": range(size - 1_200, size, 7), "anywhere": range(0, size, size // 200)}
    for place in places[part]:
        try:
            assert read_with_a_flipped_byte(tmp_path / f"{place}.h5", whole, place) == says, place
        except (ValueError, OSError) as error:
            assert f"{place}.h5" in str(error), error
            refused += 1
    assert refused > 5


def test_rows_that_changed_places_are_refused(tmp_path):
    path = tmp_path / "store.h5"
    make(path, NAMES[:6])
    with h5py.File(path, "r+") as file:
        rows = file["heatmaps"][:]
        file["heatmaps"][:] = rows[::-1]
    with pytest.raises(ValueError, match=f"store.h5 is damaged: the map of {NAMES[0]} is not the one that was written"):
        HeatmapStore(path).maps(NAMES[:6])
    with pytest.raises(ValueError, match="store.h5 is damaged"):
        make(path, NAMES[:8])  # nor are they brought into a new store


@pytest.mark.parametrize("column", ["names", "counts", "sources", "checks"])
def test_a_changed_column_is_refused(tmp_path, column):
    path = tmp_path / "store.h5"
    make(path, NAMES[:6])
    with h5py.File(path, "r+") as file:
        file[column][2] = "000099.jpg" if column == "names" else 7
    with pytest.raises(ValueError, match="store.h5 is damaged: it does not say what was written"):
        HeatmapStore(path)


def test_a_store_without_checks_is_read_and_gets_them_with_the_next_faces(tmp_path):
    path = tmp_path / "store.h5"
    maps = make(path, NAMES[:6]).maps(NAMES[:6])
    with h5py.File(path, "r+") as file:
        del file["checks"], file.attrs["seal"]
    assert torch.equal(HeatmapStore(path).maps(NAMES[:6]), maps)
    assert torch.equal(make(path, NAMES[:8]).maps(NAMES[:6]), maps)
    with h5py.File(path) as file:
        assert len(file["checks"]) == 8 and "seal" in file.attrs


# Odd files


def link(file, tmp_path):
    with h5py.File(tmp_path / "elsewhere.h5", "w") as other:
        other["heatmaps"] = file["heatmaps"][:]
    del file["heatmaps"]
    file["heatmaps"] = h5py.ExternalLink(str(tmp_path / "elsewhere.h5"), "heatmaps")


def soft_link(file, tmp_path):
    file["there"] = file["heatmaps"]
    del file["heatmaps"]
    file["heatmaps"] = h5py.SoftLink("/there")


def outside(file, tmp_path):
    (tmp_path / "raw").write_bytes(file["heatmaps"][:].tobytes())
    del file["heatmaps"]
    file.create_dataset("heatmaps", (6, 128, 128), np.float16, external=str(tmp_path / "raw"))


def virtual(file, tmp_path):
    with h5py.File(tmp_path / "elsewhere.h5", "w") as other:
        other["heatmaps"] = file["heatmaps"][:]
    del file["heatmaps"]
    layout = h5py.VirtualLayout((6, 128, 128), np.float16)
    layout[:] = h5py.VirtualSource(tmp_path / "elsewhere.h5", "heatmaps", (6, 128, 128))
    file.create_virtual_dataset("heatmaps", layout)


def unwritten(file, tmp_path):
    del file["heatmaps"]
    file.create_dataset("heatmaps", (6, 128, 128), np.float16, chunks=(1, 128, 128))
    file["heatmaps"][:5] = 0.5


def never_written(file, tmp_path):
    del file["heatmaps"]
    file.create_dataset("heatmaps", (6, 128, 128), np.float16)


def endless(file, tmp_path):
    for column in ("names", "heatmaps", "counts", "sources", "checks"):
        if column in file:
            del file[column]
    file.create_dataset("names", (10**9,), h5py.string_dtype(), chunks=(512,))
    file.create_dataset("heatmaps", (10**9, 128, 128), np.float16, chunks=(1, 128, 128))
    for column, row, kind in (("counts", (2,), np.uint16), ("sources", (16,), np.uint8)):
        file.create_dataset(column, (10**9, *row), kind, chunks=(512, *row))


def pieces(file, tmp_path):
    del file["heatmaps"]
    file.create_dataset("heatmaps", (20_000, 128, 128), np.float16, chunks=(20_000, 128, 128), compression="gzip")
    file["heatmaps"].id.write_direct_chunk((0, 0, 0), b"0")


ELSEWHERE = [link, soft_link, outside, virtual, unwritten, never_written, endless, pieces]
SAYS = "holds a link in place of|in other files|were never written|keeps heatmaps in pieces"


@pytest.mark.parametrize("odd", ELSEWHERE)
def test_rows_that_are_not_in_the_file_are_refused(tmp_path, odd):
    path = tmp_path / "store.h5"
    make(path, NAMES[:6])
    with h5py.File(path, "r+") as file:
        odd(file, tmp_path)
    for opened in (lambda: HeatmapStore(path), lambda: make(path, NAMES[:6])):
        with pytest.raises(ValueError, match=SAYS):
            opened()


@pytest.mark.parametrize("odd", ELSEWHERE)
def test_a_published_file_without_its_rows_is_not_imported(tmp_path, odd):
    path = tmp_path / "published.h5"
    with h5py.File(path, "w") as file:
        file["heatmaps"] = np.full((6, 128, 128), 0.5, np.float16)
        odd(file, tmp_path)
    with pytest.raises(ValueError, match=SAYS):
        import_published(str(path), tmp_path / "store.h5", NAMES[:6])
    assert not (tmp_path / "store.h5").exists()


def test_a_damaged_index_of_an_exported_file_is_refused(tmp_path):
    "Rows that the index has lost read as NaN, not as faces in which nothing was found."
    export_published(make(tmp_path / "store.h5", NAMES[:6]), tmp_path / "published.h5")
    with h5py.File(tmp_path / "published.h5") as file:
        assert np.isnan(file["heatmaps"].fillvalue)


@pytest.mark.parametrize(
    "settings",
    [
        "7",
        "[]",
        "{}",
        '{"classes": ["eye", "face"], "recipe": {}}',
        '{"classes": ["eye", "face"], "recipe": {"parts": []}, "detector": {"weights": "none"}}',
        '{"classes": ["eye", "face"], "recipe": {"parts": {}}}',
        '{"classes": ["eye", "face"], "recipe": {"parts": {}}, "detector": {}}',
        '{"classes": ["eye", 7], "recipe": {"parts": {}}, "detector": {"weights": "none"}}',
        '{"classes": {"eye": 0}, "recipe": {"parts": {}}, "detector": {"weights": "none"}}',
    ],
)
def test_settings_that_say_too_little_are_refused(tmp_path, settings):
    path = tmp_path / "store.h5"
    make(path, NAMES[:6])
    with h5py.File(path, "r+") as file:
        del file.attrs["seal"]
        file.attrs["settings"] = settings
    with pytest.raises(ValueError, match="store.h5 does not say how its maps were made"):
        HeatmapStore(path)


@pytest.mark.parametrize(
    "column, values",
    [
        ("names", np.array([[name.encode()] for name in NAMES[:6]])),
        ("names", np.zeros(6)),
        ("counts", np.zeros((6, 3), np.uint16)),
        ("counts", np.zeros(6, np.uint16)),
        ("counts", np.zeros((6, 2), np.float32)),
        ("sources", np.zeros((6, 4), np.uint8)),
        ("checks", np.zeros((6, 2), np.uint32)),
        ("heatmaps", np.zeros((6, 128, 128), np.int16)),
    ],
)
def test_columns_of_another_form_are_refused(tmp_path, column, values):
    path = tmp_path / "store.h5"
    make(path, NAMES[:6])
    with h5py.File(path, "r+") as file:
        del file.attrs["seal"], file[column]
        file[column] = values
    with pytest.raises(ValueError, match=f"store.h5 is no heatmap store: its {column} is "):
        HeatmapStore(path)


def changed(path, found, place, new):
    "Bytes of the file, the first ones from a place on that are as found, become others; HDF5 knows them as a new file."
    content = bytearray(path.read_bytes())
    start = content.index(found, place)
    content[start : start + len(new)] = new
    path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize("attribute", ["schema", "settings", "seal"])
def test_text_of_an_odd_type_does_not_end_the_process(tmp_path, attribute):
    "HDF5 crashes where one bit makes a list of a text of variable length, as older stores have them."
    path = tmp_path / "store.h5"
    make(path, NAMES[:6])
    with h5py.File(path, "r+") as file:
        said = file.attrs[attribute].decode()
        for name in file.attrs:
            del file.attrs[name]  # the first that is written has its type beside its name
        file.attrs[attribute] = said
    changed(path, b"\x19\x01", path.read_bytes().index(attribute.encode() + b"\0"), b"\x19\x00")

    def work():
        with pytest.raises(ValueError, match="store.h5 (is no heatmap store|does not say how|is damaged: it does not)"):
            HeatmapStore(path)

    process = forked(work)
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize("attribute", ["schema", "settings", "seal"])
def test_a_damaged_length_of_a_text_asks_for_no_memory(tmp_path, attribute):
    path = tmp_path / "store.h5"
    make(path, NAMES[:6])
    with h5py.File(path) as file:
        length = len(file.attrs[attribute])
    place = path.read_bytes().index(attribute.encode() + b"\0")
    changed(path, length.to_bytes(4, "little"), place, (2**30).to_bytes(4, "little"))

    def work():
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + 100 * 1024  # kB
        with pytest.raises((ValueError, OSError), match="store.h5"):
            HeatmapStore(path)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < most

    process = forked(work)
    process.join()
    assert process.exitcode == 0


def test_a_name_of_a_length_that_no_name_has_is_refused(tmp_path):
    "HDF5 would ask for as much memory."
    path = tmp_path / "store.h5"
    make(path, NAMES[:6])
    with h5py.File(path) as file:
        place = file["names"].id.get_chunk_info(0).byte_offset
    changed(path, len(NAMES[0]).to_bytes(4, "little"), place, (2**32 - 1).to_bytes(4, "little"))
    for opened in (lambda: HeatmapStore(path), lambda: make(path, NAMES[:8])):
        with pytest.raises(ValueError, match="store.h5 is damaged: one of its names has 4,294,967,295 bytes"):
            opened()


def test_what_is_no_part_of_a_store_is_not_read(tmp_path):
    path = tmp_path / "store.h5"
    make(path, NAMES[:6])
    with h5py.File(path, "r+") as file:
        file.create_dataset("more", (10**9,), "f4", chunks=(512,))
    with pytest.raises(ValueError, match="store.h5 holds 'more', which is no part of a store"):
        HeatmapStore(path)


# In use, and others' troubles


def test_a_store_that_another_process_holds_is_not_called_damaged(tmp_path):
    path = tmp_path / "store.h5"
    make(path, NAMES[:6])
    code = f"import h5py; f = h5py.File({str(path)!r}, 'r+'); print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        for opened in (lambda: HeatmapStore(path), lambda: make(path, NAMES[:8])):
            with pytest.raises(OSError, match="store.h5 is in use: another process has it open for writing") as told:
                opened()
            assert "remove" not in str(told.value) and "damaged" not in str(told.value)
        holder.communicate(b"\n")
    assert len(make(path, NAMES[:8])) == 8


@pytest.mark.parametrize("trouble", [RuntimeError("out of memory"), OSError("no such device"), KeyError("eye")])
def test_troubles_of_the_detector_are_its_own(tmp_path, trouble):
    class Failing(FixedBoxes):
        def __call__(self, images, names=()):
            raise trouble

    with pytest.raises(type(trouble)) as told:
        make(tmp_path / "store.h5", NAMES[:6], detector=Failing())
    assert told.value is trouble
    assert not list((tmp_path / "store.h5.parts").iterdir())


def test_the_command_in_a_sentence_is_the_one_that_helps(tmp_path):
    detector, path = bundled_detector(confidence=0.4), tmp_path / "my maps.h5"
    recipe = Recipe({"eye": RECIPE.parts["eye"]})
    store = make_heatmaps(path, FACES.images, NAMES[:2], detector, recipe, report=quiet)
    with pytest.raises(ValueError) as told:
        store.maps(NAMES[:4])
    command = str(told.value).split("make them with: ")[1]
    assert shlex.split(command) == [
        *("facesr", "heatmaps", "make", "--out", str(path), "--data", "FOLDER"),
        *("--confidence", "0.4", "--parts", "TABLE.csv"),
    ]
    export_published(store, tmp_path / "published.h5")
    imported = import_published(str(tmp_path / "published.h5"), tmp_path / "imported.h5", NAMES[:2])
    with pytest.raises(ValueError, match="it was imported, and holds the faces of the file it came from"):
        imported.maps(NAMES[:4])


def test_other_images_under_the_same_names_are_not_done(tmp_path):
    path, images = tmp_path / "store.h5", tmp_path / "images"
    images.mkdir()
    for name, other in zip(NAMES[:8], NAMES[8:16]):
        shutil.copy(FACES.images / other, images / name)
    make(path, NAMES[:8])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="was made for other images: 8 of 8 faces that were compared are others in"):
        make_heatmaps(path, images, NAMES[:8], FixedBoxes(), RECIPE, report=quiet)
    assert path.read_bytes() == before
    assert len(make(path, NAMES[:8])) == 8  # those it was made from are done, as before


# Names


def test_names_that_are_exported_are_the_names_that_are_imported(tmp_path):
    images, odd = tmp_path / "images", ["a\nb.jpg", "c\r.jpg", '"d".jpg', " e .jpg", "\ufefff.jpg", "g\u2028.jpg", "ä"]
    images.mkdir()
    for name, face in zip(odd, NAMES):
        shutil.copy(FACES.images / face, images / name)
    store = make_heatmaps(tmp_path / "store.h5", images, odd, FixedBoxes(), RECIPE, report=quiet)
    assert not CliRunner().invoke(heatmaps_app, ["export", str(store.path), str(tmp_path / "moved.h5")]).exception
    names = read_names(tmp_path / "moved.h5.names.txt")
    assert names == sorted(odd)
    back = import_published(str(tmp_path / "moved.h5"), tmp_path / "back.h5", names)
    assert torch.equal(back.maps(odd), store.maps(odd))


# Full disks, and folders that cannot be written to


@pytest.fixture
def small_disk(tmp_path):
    "Mounts a disk of so many bytes in memory; a test that asks for one is skipped where that is not allowed."
    mounted = []

    def mount(size, options="rw"):
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size},{options}", "none", str(place)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no disk can be mounted here: {error}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


def told_in_a_process(*works):
    "What each work ends in, in a process of its own: the library might crash."
    mine, others = multiprocessing.Pipe()

    def tell():
        for work in works:
            try:
                work()
            except Exception as error:
                others.send(f"{type(error).__name__} {error}")

    process = forked(tell)
    process.join()
    assert process.exitcode == 0
    return [mine.recv() for _ in works]


def test_a_full_disk_ends_in_a_sentence(small_disk, monkeypatch):
    monkeypatch.setattr("facesr.store.SHARD", 8)
    places = [small_disk(size) / "store.h5" for size in ("40k", "80k", "160k", "320k", "480k", "640k")]
    works = [partial(make, place) for place in places]
    for place, said in zip(places, told_in_a_process(*works), strict=True):
        full = f"OSError {place} cannot be written (No space left on device); make room"
        at_the_join = said.startswith(f"OSError {place} needs ") and "MB are free there; make room" in said
        in_a_shard = said.replace(".parts/", " ").startswith(f"OSError {place} ") and "(No space left on" in said
        assert said.startswith(full) or at_the_join or in_a_shard, said
        assert not [path for path in place.parent.rglob("*") if path.suffix == ".part"]
        for shard in place.parent.rglob("*.h5"):  # nothing that was finished is lost
            assert len(HeatmapStore(shard)) == 8


def test_a_full_disk_while_exporting_and_importing(tmp_path, small_disk):
    disk = small_disk("100k")
    export_published(make(tmp_path / "store.h5"), tmp_path / "whole.h5")
    out = disk / "out.h5"
    exporting = partial(export_published, HeatmapStore(tmp_path / "store.h5"), out)
    for said in told_in_a_process(exporting, partial(import_published, str(tmp_path / "whole.h5"), out, NAMES)):
        assert said.startswith(f"OSError {out} cannot be written (No space left on device); make room"), said
    assert not list(disk.iterdir())


def test_an_error_at_any_write_is_told(tmp_path, monkeypatch):
    "The first, the second, and so on to the last: each time one sentence, and nothing left."
    import facesr.store as module

    written, fails_at = 0, 10**9
    real = module._Disk.write

    def write(disk, block):
        nonlocal written
        written += 1
        if written >= fails_at and not disk.error:
            disk.error = OSError(28, "No space left on device")
        return real(disk, block)

    monkeypatch.setattr(module._Disk, "write", write)
    settings = {"classes": [], "recipe": {"parts": {}}}

    def work():
        with module._new_file(tmp_path / "x.h5", settings) as file:
            for start in range(0, 40, 8):
                maps = np.full((8, 128, 128), 0.5, np.float16)
                module._append(file, heatmaps=maps, names=NAMES[start : start + 8], flat=np.ones(8, bool))

    work()
    (tmp_path / "x.h5").unlink()
    for fails_at in range(1, written):
        written = 0
        with pytest.raises(OSError, match="x.h5 cannot be written .No space left on device"):
            work()
        assert not list(tmp_path.iterdir())


def test_a_folder_that_is_read_only_is_told(tmp_path, small_disk):
    disk = small_disk("1M", "ro")
    store = make(tmp_path / "store.h5", NAMES[:6])
    export_published(store, tmp_path / "whole.h5")
    for work in (
        lambda: export_published(store, disk / "out.h5"),
        lambda: import_published(str(tmp_path / "whole.h5"), disk / "out.h5", NAMES[:6]),
        lambda: make(disk / "out.h5", NAMES[:6]),
    ):
        with pytest.raises(OSError, match="out.h5 cannot be written .*(Read-only|read-only)"):
            work()


def test_commands_that_cannot_write_name_the_file(tmp_path, small_disk):
    disk, store = small_disk("1M", "ro"), tmp_path / "store.h5"
    make(store, NAMES[:6])
    export_published(HeatmapStore(store), tmp_path / "whole.h5")
    for command, file in (
        (["show", store, "--figure", disk / "coverage.png"], "coverage.png"),
        (["show", store, "--figure", tmp_path / "store.h5" / "coverage.png"], "coverage.png"),
        (["export", store, disk / "out.h5"], "out.h5"),
        (["import", tmp_path / "whole.h5", disk / "out.h5"], "out.h5"),
    ):
        done = CliRunner().invoke(heatmaps_app, [str(word) for word in command])
        assert isinstance(done.exception, OSError) and f"{file} cannot be written" in str(done.exception), done


def test_what_a_killed_process_left_is_tidied_up(tmp_path):
    (tmp_path / "store.h5.0badcafe.part").write_bytes(b"half")
    make(tmp_path / "store.h5", NAMES[:2])
    assert sorted(os.listdir(tmp_path)) == [".store.h5.lock", "store.h5"]
