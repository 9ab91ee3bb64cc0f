"The heatmap store: killed and continued, damaged, mixed up, fetched and written in the published layout."

import http.server
import json
import os
import resource
import shutil
import signal
import threading
import time
from functools import partial

import h5py
import numpy as np
import pytest
import torch

from conftest import forked
from fuzz import FixedBoxes

import facesr.store as store
from facesr.detection import bundled_detector
from facesr.faces import BUNDLED, FaceDataset, find_faces, read_pixels
from facesr.heatmaps import Part, Recipe
from facesr.losses import attention_weights
from facesr.store import coverage_figure, export_published, HeatmapStore, import_published, make_heatmaps

FACES = find_faces(BUNDLED)
NAMES = FACES.names("train", 40)
RECIPE = Recipe({"eye": Part(4.5), "face": Part(4, "rim")})


def make(path, names=NAMES, **options):
    return make_heatmaps(
        path,
        FACES.images,
        names,
        options.pop("detector", FixedBoxes()),
        options.pop("recipe", RECIPE),
        report=lambda line: None,
        **options,
    )


def content(path):
    "Everything a store says."
    with h5py.File(path) as file:
        return {
            name: file[name][:].tobytes() if name != "names" else file[name].asstr()[:].tolist() for name in file
        }, dict(file.attrs)


def make_slowly(path):
    quick = store.heatmap
    store.heatmap = lambda *a: (time.sleep(0.02), quick(*a))[1]
    make(path)


def test_killed_and_continued_is_the_same_as_made_in_one_go(tmp_path, monkeypatch):
    monkeypatch.setattr("facesr.store.SHARD", 8)
    whole, broken = tmp_path / "whole.h5", tmp_path / "broken.h5"
    make(whole)
    shards, kills = tmp_path / "broken.h5.parts", 0
    while kills < 2:  # once after the first shard, once after the third
        process = forked(make_slowly, broken)
        while process.is_alive() and len(list(shards.glob("*.h5"))) < 1 + 2 * kills:
            time.sleep(0.005)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the process ended before it was killed"
        assert not broken.exists()
        kills += 1
    said = []
    make_heatmaps(broken, FACES.images, NAMES, FixedBoxes(), RECIPE, report=said.append)
    assert said[0] in [f"heatmaps: {done} of 40 faces were done before" for done in (24, 32)]
    assert content(whole) == content(broken)
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".lock") == ["broken.h5", "whole.h5"]


def test_unfinished_work_of_another_recipe_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("facesr.store.SHARD", 8)
    path = tmp_path / "store.h5"
    monkeypatch.setattr("facesr.store._gather", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        make(path)
    monkeypatch.undo()
    monkeypatch.setattr("facesr.store.SHARD", 8)
    before = sorted((tmp_path / "store.h5.parts").iterdir())
    with pytest.raises(ValueError, match="store.h5.parts holds heatmaps with another recipe"):
        make(path, recipe=Recipe({"eye": Part(1)}))
    assert sorted((tmp_path / "store.h5.parts").iterdir()) == before and len(before) == 5
    assert len(make(path)) == 40


class Stopped(Exception):
    pass


class Counted(FixedBoxes):
    "Counts the faces that it sees, and stops the work after so many."

    def __init__(self, stop_after=1_000):
        self.seen, self.stop_after = 0, stop_after

    def __call__(self, images, names=()):
        if self.seen + len(images) > self.stop_after:
            raise Stopped
        self.seen += len(images)
        return super().__call__(images)


def test_a_smaller_run_takes_nothing_from_an_interrupted_larger_one(tmp_path, monkeypatch):
    monkeypatch.setattr("facesr.store.SHARD", 8)
    path = tmp_path / "store.h5"
    with pytest.raises(Stopped):
        make(path, detector=Counted(stop_after=16))
    assert make(path, NAMES[:3] + NAMES[30:32], detector=(smaller := Counted())).names == NAMES[:16] + NAMES[30:32]
    assert make(path, detector=(larger := Counted())).names == NAMES[:16] + NAMES[30:32] + NAMES[16:30] + NAMES[32:]
    assert (smaller.seen, larger.seen) == (2, 22)
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".lock"] == ["store.h5"]


def test_killed_between_gathering_and_tidying_up(tmp_path, monkeypatch):
    monkeypatch.setattr("facesr.store.SHARD", 8)
    path = tmp_path / "store.h5"
    with monkeypatch.context() as killed, pytest.raises(Stopped):
        killed.setattr("facesr.store.shutil.rmtree", lambda shards: (_ for _ in ()).throw(Stopped))
        make(path, NAMES[:20])
    before = content(path)
    assert len(list((tmp_path / "store.h5.parts").iterdir())) == 3
    store = make(path, NAMES[:20], detector=(idle := Counted()))
    assert (store.names, idle.seen, content(path)) == (NAMES[:20], 0, before)
    assert not (tmp_path / "store.h5.parts").exists()


def test_what_was_done_before_is_counted_of_the_faces_that_are_asked_for(tmp_path):
    path, said = tmp_path / "store.h5", []
    make(path, NAMES[:30])
    asked = (path, FACES.images, NAMES[25:35], FixedBoxes(), RECIPE)
    make_heatmaps(*asked, report=said.append)
    assert said[0] == "heatmaps: 5 of 10 faces were done before" and said[1].startswith("heatmaps: 5/5 faces | ")
    make_heatmaps(*asked, report=said.append)
    assert len(said) == 2


def test_adding_faces_keeps_those_that_are_there(tmp_path):
    path = tmp_path / "store.h5"
    make(path, NAMES[:10])
    before = content(path)[0]
    store = make(path, NAMES[:5] + NAMES[20:25])
    assert store.names == NAMES[:10] + NAMES[20:25]
    assert content(path)[0]["heatmaps"][: len(before["heatmaps"])] == before["heatmaps"]


@pytest.mark.parametrize(
    "damage, sentence",
    [
        ("cut off", "cannot be read as HDF5: it is damaged, cut off"),
        ("text", "cannot be read as HDF5"),
        ("duplicate", "holds 000001.jpg more than once"),
        ("size", "its heatmaps is float16 \\(40, 64, 128\\)"),
        ("rows", "has 40 heatmaps, 39 names, 40 sources, 40 checks, 40 counts; there has to be one of each"),
        ("group", "its heatmaps is no column"),
        ("numbers", "its names is int64 \\(40,\\)"),
        ("settings", "cannot be read as HDF5"),
        ("no counts", "store.h5 has no counts; it is incomplete"),
        ("no names", "it looks like a published file"),
        ("schema", "is no heatmap store"),
    ],
)
def test_a_damaged_store_is_refused_when_it_is_opened(tmp_path, damage, sentence):
    path = tmp_path / "store.h5"
    make(path)
    if damage == "cut off":
        path.write_bytes(path.read_bytes()[:-50_000])
    elif damage == "text":
        path.write_text("no HDF5")
    else:
        with h5py.File(path, "r+") as file:
            if damage == "duplicate":
                file["names"][7] = "000001.jpg"
                del file.attrs["seal"]
            elif damage == "size":
                del file["heatmaps"]
                file["heatmaps"] = np.zeros((40, 64, 128), np.float16)
            elif damage == "rows":
                file["names"].resize(39, axis=0)
            elif damage == "group":
                del file["heatmaps"]
                file.create_group("heatmaps")
            elif damage == "numbers":
                del file["names"]
                file["names"] = np.arange(40)
            elif damage == "settings":
                file.attrs["settings"] = "{"
            elif damage == "no counts":
                del file["counts"]
            elif damage == "no names":
                del file["names"], file.attrs["schema"]
            else:
                file.attrs["schema"] = "something 2"
    left = path.read_bytes()
    for opened in (lambda: HeatmapStore(path), lambda: make(path)):
        with pytest.raises(ValueError, match=sentence):
            opened()
    assert path.read_bytes() == left  # nothing lost


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.5, 1.5])
def test_values_that_are_no_map_are_refused_with_the_face_named(tmp_path, value):
    path = tmp_path / "store.h5"
    make(path)
    with h5py.File(path, "r+") as file:
        file["heatmaps"][3, 5, 5] = value
    store = HeatmapStore(path)
    assert store.maps(NAMES[:3]).shape == (3, 1, 128, 128)
    with pytest.raises(ValueError, match="NaN or values outside \\[0, 1\\] for 000004.jpg"):
        store.maps(NAMES[:5])


def test_a_chunk_that_is_damaged_on_disk_is_named(tmp_path):
    path = tmp_path / "store.h5"
    make(path)
    with h5py.File(path) as file:
        place = file["heatmaps"].id.get_chunk_info(2)
    content = bytearray(path.read_bytes())
    content[place.byte_offset : place.byte_offset + place.size] = os.urandom(place.size)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="store.h5 cannot be read as HDF5"):
        HeatmapStore(path).maps(NAMES[:5])


def test_maps_of_other_images_are_refused(tmp_path):
    path = tmp_path / "store.h5"
    store = make(path)
    pixels = read_pixels(FACES.images, NAMES).levels[128]
    store.check(NAMES, pixels)
    pixels[4, 0, 0, 0] += 1
    with pytest.raises(ValueError, match="was made for other images: 1 of 40 faces .*000005.jpg"):
        store.check(NAMES, pixels)
    with pytest.raises(ValueError, match="was made for other images: 40 of 40"):
        store.check(NAMES, pixels.flip(0))  # the wrong order


def test_an_unreadable_image_stops_the_work_and_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("facesr.store.SHARD", 4)
    images = tmp_path / "images"
    images.mkdir()
    for name in NAMES[:8]:
        (images / name).write_bytes((FACES.images / name).read_bytes())
    (images / NAMES[5]).write_bytes(b"no image")
    (images / NAMES[6]).unlink()
    path = tmp_path / "store.h5"
    arguments = (path, images, NAMES[:8], FixedBoxes(), RECIPE)
    with pytest.raises(ValueError, match="2 of 4 images cannot be read .*000006.jpg.*000007.jpg: is not there"):
        make_heatmaps(*arguments, report=lambda line: None)
    assert not path.exists() and len(list((tmp_path / "store.h5.parts").iterdir())) == 1  # what was finished is kept
    said = []
    store = make_heatmaps(*arguments, skip_unreadable=True, report=said.append)
    assert store.names == NAMES[:5] + NAMES[7:8]
    assert said[-2].startswith("heatmaps: 2/2 faces | ")
    assert said[-1].startswith("left out 2 images that give no face: 000006.jpg (no image that can be decoded")
    assert said[-1].endswith(", 000007.jpg (is not there)")
    assert (
        make_heatmaps(*arguments, skip_unreadable=True, report=said.append).names == store.names
    )  # the same again: nothing is left but what cannot be read
    with pytest.raises(ValueError, match="none of the 2 images in .* can be read"):
        make_heatmaps(
            tmp_path / "other.h5", images, NAMES[5:7], FixedBoxes(), RECIPE, skip_unreadable=True, report=said.append
        )


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="store.h5 cannot be written"):
        make(tmp_path / "file" / "store.h5", NAMES[:4])


def test_a_full_disk_costs_nothing_that_was_finished(tmp_path, monkeypatch):
    "Files are limited to a size that a shard fits in and the whole store does not."


    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300 * 1024, 300 * 1024))
        with pytest.raises(OSError, match="store.h5 cannot be written .* what was finished before is kept"):
            make(tmp_path / "store.h5")

    monkeypatch.setattr(store, "SHARD", 8)
    process = forked(work)
    process.join()
    assert process.exitcode == 0
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".lock"] == ["store.h5.parts"] and len(
        list((tmp_path / "store.h5.parts").glob("*.h5"))
    ) == 5
    assert len(make(tmp_path / "other.h5")) == 40


def test_two_processes_that_want_the_same_maps_make_them_once(tmp_path):
    class Noted(FixedBoxes):
        "Writes down how many faces it has seen, and takes its time."

        def __call__(self, images, names=()):
            with open(tmp_path / "seen", "a") as file:
                file.write(f"{len(images)} ")
            time.sleep(0.3)
            return super().__call__(images)

    both = [forked(partial(make, tmp_path / "store.h5", detector=Noted(), batch_size=10)) for _ in range(2)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert HeatmapStore(tmp_path / "store.h5").names == NAMES
    assert (tmp_path / "seen").read_text() == "10 10 10 10 "


def test_every_face_of_a_batch_gets_its_own_map(tmp_path):
    store = make(tmp_path / "store.h5", NAMES[::-1])  # another order than that of the dataset
    dataset = FaceDataset(read_pixels(FACES.images, NAMES), store.maps)
    for i in range(0, 40, 2):
        batch = dataset.batch([(i, False), (i + 1, True)])
        straight, mirrored = store.maps([NAMES[i]])[0], store.maps([NAMES[i + 1]])[0].flip(-1)
        assert batch.names == NAMES[i : i + 2] and torch.equal(batch.heatmap, torch.stack([straight, mirrored]))


def test_opening_a_store_does_not_read_it(tmp_path):
    "Memory does not grow with the maps: 2 GB of them are opened, and one is read."
    path = tmp_path / "store.h5"
    make(path, NAMES[:1])
    with h5py.File(path, "r+") as file:
        count = 65_536
        del file["checks"], file.attrs["seal"]  # as in a store that was made before there were any
        packed = file["heatmaps"].id.read_direct_chunk((0, 0, 0))[1]
        for column in ("heatmaps", "counts", "sources"):
            file[column].resize(count, axis=0)
        for row in range(1, count):  # the same map again takes little place on the disk
            file["heatmaps"].id.write_direct_chunk((row, 0, 0), packed)
        file["counts"][:], file["sources"][:] = 1, 0
        file["names"].resize(count, axis=0)
        file["names"][:] = [f"{i:06d}.jpg" for i in range(count)]

    def work():
        start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        HeatmapStore(path).maps(["000000.jpg", "065535.jpg"])
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) // 1024 < 200  # MB

    process = forked(work)
    process.join()
    assert process.exitcode == 0


def test_published_layout_over_http_and_from_a_file(tmp_path):
    store = make(tmp_path / "store.h5")
    (tmp_path / "served").mkdir()
    export_published(store, tmp_path / "served" / "published.h5")
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *a: None})
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(quiet, directory=str(tmp_path / "served"))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/published.h5"
        fetched = import_published(url, tmp_path / "fetched.h5", NAMES, report=lambda line: None)
        with pytest.raises(OSError, match="absent.h5 cannot be fetched"):
            import_published(url.replace("published", "absent"), tmp_path / "absent.h5", NAMES)
    finally:
        server.shutdown()
    local = import_published(str(tmp_path / "served" / "published.h5"), tmp_path / "local.h5", NAMES)
    assert torch.equal(fetched.maps(NAMES), store.maps(NAMES)) and torch.equal(local.maps(NAMES), store.maps(NAMES))
    assert fetched.fingerprint == local.fingerprint != store.fingerprint
    assert not list(tmp_path.glob("*.download")) and not (tmp_path / "absent.h5").exists()


@pytest.mark.parametrize("published", ["nan", "shape", "integers", "group", "empty", "nothing", "text"])
def test_what_is_no_published_file_is_not_imported(tmp_path, published):
    path = tmp_path / "published.h5"
    with h5py.File(path, "w") as file:
        maps = np.zeros((4, 128, 128), np.float16)
        if published == "nan":
            maps[2, 0, 0] = np.nan
        if published == "group":
            file.create_group("heatmaps")
        else:
            file["heatmaps"] = (
                h5py.Empty("f")
                if published == "nothing"
                else maps[:0]
                if published == "empty"
                else maps[:, :64]
                if published == "shape"
                else maps.astype(np.int32)
                if published == "integers"
                else maps
            )
    if published == "text":
        path.write_text("no HDF5")
    sentence = {"nan": "for 000003.jpg", "text": "cannot be read as HDF5"}.get(
        published, "it has to hold one dataset 'heatmaps'"
    )
    with pytest.raises(ValueError, match=sentence):
        import_published(str(path), tmp_path / "store.h5", [] if published == "empty" else NAMES[:4])
    assert [path.name for path in tmp_path.iterdir()] == ["published.h5"]


def test_rows_go_to_celebas_first_training_images_only_where_there_are_as_many_as_were_published(tmp_path, monkeypatch):
    path = tmp_path / "published.h5"
    with h5py.File(path, "w") as file:
        file["heatmaps"] = np.linspace(0, 1, 4)[:, None, None] * np.tri(128, dtype=np.float16)
    with pytest.raises(
        ValueError,
        match="published.h5 holds 4 maps, and a published file 10,000, 30,000 or 50,000: whose these are is not known",
    ):
        import_published(str(path), tmp_path / "store.h5")
    assert not (tmp_path / "store.h5").exists()
    monkeypatch.setattr("facesr.store.PUBLISHED_ROWS", (2, 4))
    store = import_published(str(path), tmp_path / "store.h5")
    assert store.names == ["000001.jpg", "000002.jpg", "000003.jpg", "000004.jpg"]
    assert store.maps(["000004.jpg"]).max() == 1 and store.maps(["000001.jpg"]).max() == 0


def test_flat_imported_maps_count_as_without_detections(tmp_path):
    maps = np.zeros((4, 128, 128), np.float16)
    maps[1], maps[2, 5, 5], maps[3] = 0.5, 0.25, np.tri(128)
    with h5py.File(tmp_path / "published.h5", "w") as file:
        file["heatmaps"] = maps
    store = import_published(str(tmp_path / "published.h5"), tmp_path / "store.h5", NAMES[:4])
    assert store.empty == NAMES[:2]
    assert (attention_weights(store.maps(NAMES[:4])) == 1).all((1, 2, 3)).tolist() == [True, True, False, False]
    assert "4 faces, 2 without any detection" in [ax.get_title() for ax in coverage_figure(store).axes]


def test_maps_that_were_exported_come_back_under_their_names(command, tmp_path):
    store = make(tmp_path / "store.h5", NAMES[20:32])
    assert command("heatmaps", "export", tmp_path / "store.h5", tmp_path / "moved.h5").returncode == 0
    back = command("heatmaps", "import", tmp_path / "moved.h5", tmp_path / "back.h5")
    assert back.returncode == 0 and "rows: 000021.jpg to 000032.jpg, named by" in back.stdout, back.stderr
    assert torch.equal(HeatmapStore(tmp_path / "back.h5").maps(NAMES[20:32]), store.maps(NAMES[20:32]))
    (tmp_path / "moved.h5.names.txt").rename(tmp_path / "mine.txt")
    refused = command("heatmaps", "import", tmp_path / "moved.h5", tmp_path / "nameless.h5")
    assert (
        refused.returncode == 1
        and "whose these are is not known" in refused.stderr.splitlines()[-1]
        and not (tmp_path / "nameless.h5").exists()
    )
    words = ("import", tmp_path / "moved.h5", tmp_path / "named.h5", "--names", tmp_path / "mine.txt")
    named = command("heatmaps", *words)
    assert named.returncode == 0 and HeatmapStore(tmp_path / "named.h5").names == NAMES[20:32]


def test_a_training_face_without_a_map_stops_the_run_with_the_command(tmp_path, command):
    make(tmp_path / "mine.h5", NAMES[:20])
    done = command(
        "train", "heatmap", "--preset", "smoke", "--out", tmp_path, "--set", f"heatmaps={tmp_path / 'mine.h5'}"
    )
    assert done.returncode == 1
    assert (
        done.stderr.splitlines()[-1].startswith("error:")
        and "has no heatmap for 12 of 32 faces" in done.stderr
        and f"facesr heatmaps make --out {tmp_path / 'mine.h5'}" in done.stderr
    )
    assert not (tmp_path / "smoke" / "heatmap" / "seed0" / "metrics.json").exists()


def test_ones_own_detector_from_the_command_line(command, tmp_path):
    "The README's four commands, with a checkpoint whose classes are more than the table names."
    bundled_detector().yolo.save(tmp_path / "mine.pt")
    (tmp_path / "parts.csv").write_text("class,weight,fade\neye,4.5,centre\nface,4,rim\n")
    (tmp_path / "images").mkdir()
    for name in NAMES:
        shutil.copy(FACES.images / name, tmp_path / "images")
    path, data, network = tmp_path / "mine.h5", ("--data", tmp_path / "images"), ("--detector", tmp_path / "mine.pt")
    made = command("heatmaps", "make", *data, *network, "--parts", tmp_path / "parts.csv", "--out", path)
    assert made.returncode == 0 and "40 heatmaps" in made.stdout, made.stderr
    shown = command("heatmaps", "show", path, "--figure", tmp_path / "coverage.png")
    assert shown.returncode == 0 and (tmp_path / "coverage.png").stat().st_size > 10_000
    settings = (f"heatmaps={path}", "epochs=1", "perceptual_weight=0", "train_faces=16", "test_faces=2")
    words = [word for setting in settings for word in ("--set", setting)]
    trained = command("train", "heatmap", "--preset", "smoke", *data, *words, "--out", tmp_path / "results")
    assert trained.returncode == 0, trained.stderr
    recorded = json.loads((tmp_path / "results" / "smoke" / "heatmap" / "seed0" / "config.json").read_text())
    assert set(recorded["heatmaps"]["recipe"]["parts"]) == {"eye", "face"}
    refused = command("heatmaps", "make", *data, *network, "--out", tmp_path / "other.h5")
    assert refused.returncode == 1 and "mine.pt does not know" in refused.stderr.splitlines()[-1]
    assert not (tmp_path / "other.h5").exists()
