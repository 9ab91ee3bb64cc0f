"Another domain, from a folder of pictures with boxes that people drew to a report: drawn shapes stand for it."

import json
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from conftest import FACESR, ROOT
from PIL import Image, ImageDraw

from facesr.detection import Annotations, drawn_boxes
from facesr.faces import FaceSet, find_faces
from facesr.store import HeatmapStore

SPLITS = {"train": 24, "val": 6, "test": 6}
SHAPES = ("disc", "square")
SETTINGS = "epochs=1 width=16 blocks=1 batch_size=8 perceptual_share=0.125".split()


def shapes(random, size):
    "A picture with one or two shapes, and their boxes: class, left, top, right, bottom."
    image = Image.fromarray(random.integers(90, 130, (size, size, 3), np.uint8))
    draw, boxes = ImageDraw.Draw(image), []
    for kind in range(random.integers(1, 3)):
        left, top = (int(x) for x in random.integers(4, size // 4, 2) + kind * (size // 2 - 8))
        box = (left, top, left + size // 4, top + size // 4)
        (draw.ellipse, draw.rectangle)[kind](box, fill=((200, 40, 60), (40, 60, 200))[kind])
        boxes.append((kind, *box))
    return image, boxes


@pytest.fixture(scope="module")
def domain(tmp_path_factory):
    "A folder in the layout of YOLO, with two pictures of one group each."
    root, random, groups = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0), ["name,group"]
    for split, count in SPLITS.items():
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for number in range(count):
            image, boxes = shapes(random, 160)
            image.save(root / "images" / split / f"{number:03}.png")
            middles = ((k, (a + c) / 320, (b + d) / 320, (c - a) / 160, (d - b) / 160) for k, a, b, c, d in boxes)
            lines = "".join(" ".join(map(str, box)) + "\n" for box in middles)
            (root / "labels" / split / f"{number:03}.txt").write_text(lines)
            groups.append(f"{split}/{number:03}.png,{split} {number // 2}")
    (root / "data.yaml").write_text("path: .\ntrain: images/train\nnames: {0: disc, 1: square}\n")
    (root / "groups.csv").write_text("\n".join(groups))
    return root


@pytest.fixture(scope="module")
def other_layouts(domain, tmp_path_factory):
    "The same boxes as Pascal VOC and as COCO."
    place = tmp_path_factory.mktemp("layouts")
    categories = [{"id": 10 + k, "name": name} for k, name in enumerate(SHAPES)]
    coco = {"images": [], "annotations": [], "categories": categories}
    for number, label in enumerate(sorted((domain / "labels").rglob("*.txt"))):
        name = label.relative_to(domain / "labels").with_suffix("")
        coco["images"].append({"id": number, "file_name": f"{name}.png"})
        page = ElementTree.Element("annotation")
        for line in label.read_text().splitlines():
            kind, x, y, width, height = (float(word) for word in line.split())
            left, top, width, height = (160 * side for side in (x - width / 2, y - height / 2, width, height))
            box = [left, top, width, height]
            coco["annotations"].append({"image_id": number, "category_id": 10 + int(kind), "bbox": box})
            thing = ElementTree.SubElement(page, "object")
            ElementTree.SubElement(thing, "name").text = SHAPES[int(kind)]
            ends = zip(("xmin", "ymin", "xmax", "ymax"), (left + 1, top + 1, left + width, top + height))
            drawn = ElementTree.SubElement(thing, "bndbox")
            for end, value in ends:
                ElementTree.SubElement(drawn, end).text = str(value)
        (place / "voc" / name.parent).mkdir(parents=True, exist_ok=True)
        ElementTree.ElementTree(page).write(place / "voc" / f"{name}.xml")
    (place / "coco.json").write_text(json.dumps(coco))
    return place


def test_three_layouts_hold_the_same_boxes(domain, other_layouts):
    faces = find_faces(domain)
    names = faces.names("test")
    found = [
        Annotations(place, faces)(None, names)
        for place in (domain / "labels", other_layouts / "voc", other_layouts / "coco.json")
    ]
    assert sum(map(len, found[0])) > len(names)
    for of_yolo, *others in zip(*found):
        for other in others:
            assert other.classes == of_yolo.classes
            np.testing.assert_allclose(other.boxes, of_yolo.boxes, atol=1e-3)


def test_the_folder_says_splits_groups_and_boxes(domain):
    faces = find_faces(domain)
    assert {split: len(faces.names(split)) for split in SPLITS} == SPLITS
    assert faces.people(["test/000.png", "test/001.png"]) == [faces.people(["test/000.png"])[0]] * 2
    assert "boxes of parts in labels" in str(faces)


@pytest.fixture(scope="module")
def studied(domain, tmp_path_factory):
    "Heatmaps, three runs and the report, by the commands of the README."
    work = tmp_path_factory.mktemp("work")
    (work / "parts.csv").write_text("class,weight,fade\ndisc,4,centre\nsquare,4,rim\n")
    store, results = work / "shapes.h5", work / "results"
    data, out = ("--data", domain), ("--out", results)
    train = ["--preset", "own", *data, *out, *(word for setting in SETTINGS for word in ("--set", setting))]
    papermill = [sys.executable, "-m", "papermill", "nbs/report.ipynb", work / "report.ipynb", "--no-progress-bar"]
    lines = [
        [FACESR, "heatmaps", "make", *data, "--detector", domain / "labels", "--parts", work / "parts.csv"]
        + ["--out", store],
        *([FACESR, "train", variant, *train] for variant in ("baseline", "uniform")),
        [FACESR, "train", "heatmap", *train, "--set", f"heatmaps={store}"],
        [*papermill, "-p", "preset", "own", "-p", "data", domain, "-p", "out", results],
    ]
    for line in lines:
        done = subprocess.run(list(map(str, line)), cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
    return work


def test_maps_are_made_of_the_boxes(studied, domain):
    store = HeatmapStore(studied / "shapes.h5")
    assert store.settings["detector"]["weights"] == "people (YOLO)" and store.classes == list(SHAPES)
    faces = find_faces(domain)
    seen = drawn_boxes(faces)(None, store.names)
    for drawn, heatmap in zip(seen, store.maps(store.names)[:, 0].numpy()):
        inside = np.zeros((128, 128), bool)
        for left, top, right, bottom in drawn.boxes.round().astype(int):
            inside[top:bottom, left:right] = True
        assert heatmap[inside].mean() > 5 * heatmap[~inside].mean()


def test_runs_measure_what_is_in_the_boxes(studied):
    run = studied / "results" / "own" / "heatmap" / "seed0"
    table = pd.read_csv(run / "per_image.csv")
    assert [f"psnr_in_{shape}" for shape in SHAPES] == [name for name in table if name.startswith("psnr_in_")]
    assert not {"psnr_eye", "identity_cosine", "landmark_error"} & set(table)  # what only faces have
    recorded = json.loads((run / "config.json").read_text())
    assert recorded["faces"]["boxes"]["classes"] == list(SHAPES)
    test = json.loads((run / "metrics.json").read_text())["test"]
    assert test["psnr_in_disc"]["people"] == 3 and test["psnr_in_square"]["n"] == table["psnr_in_square"].notna().sum()


def test_the_report_speaks_of_this_domain(studied):
    page = (studied / "report.ipynb").read_text()
    for words in ("of another domain", "In the boxes of disc", "In the boxes of square", "PSNR, square (dB)"):
        assert words in page, words
    for words in ("and its eyes enlarged", "In the eyes", "PSNR, eyes", "dlib"):
        assert words not in json.dumps(outputs(page)), words
    weights = pd.read_csv(studied / "results" / "own" / "map_weights.csv", index_col=0)
    assert (weights.loc["heatmap"] > 1.5).all() and list(weights) == list(SHAPES)


def outputs(page):
    "What the cells of a notebook show."
    return [cell.get("outputs") for cell in json.loads(page)["cells"]]


def pictures(folder):
    "One picture there."
    return FaceSet(folder, pd.DataFrame({"name": ["a.png"]}), "folder", "for the test")


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.xml", "<annotation><object>", "cannot be read as Pascal VOC"),
        ("a.xml", "<annotation><object><name>x</name></object></annotation>", "cannot be read as Pascal VOC"),
        ("a.txt", "0 0.5 0.5 0.1 0.1\n", "neither data.yaml nor classes.txt"),
        ("a.json", "[" * 100_000, "cannot be read as COCO's JSON"),
        ("a.json", '{"images": [], "annotations": [{}], "categories": []}', "cannot be read as COCO's JSON"),
    ],
)
def test_boxes_that_cannot_be_read_are_named(tmp_path, name, content, said):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / name).write_text(content)
    place = tmp_path / "b" / (name if name.endswith("json") else "")
    with pytest.raises(ValueError, match=said):
        Annotations(place, pictures(tmp_path))


@pytest.mark.parametrize(
    "line", ["0 0.5 0.5 0.1", "7 0.5 0.5 0.1 0.1", "0 nan 0.5 0.1 0.1", "x 0 0 0 0", "-1 0 0 0 0", "0 80 80 20 20"]
)
def test_a_line_that_is_no_box_is_refused(tmp_path, line):
    (tmp_path / "a.txt").write_text(line)
    (tmp_path / "classes.txt").write_text("disc\n")
    with pytest.raises(ValueError, match="a.txt cannot be read as YOLO"):
        Annotations(tmp_path, pictures(tmp_path))


@pytest.mark.parametrize("name", ["<script>", "a$b", "", "x" * 61, "two\nlines"])
def test_a_class_that_cannot_stand_in_a_page_is_refused(tmp_path, name):
    thing = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}
    coco = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [thing]}
    coco["categories"] = [{"id": 1, "name": name}]
    (tmp_path / "b.json").write_text(json.dumps(coco))
    with pytest.raises(ValueError, match="b.json has a class .*; a name has 1 to 60 letters"):
        Annotations(tmp_path / "b.json", pictures(tmp_path))


def test_pictures_of_one_name_do_not_share_boxes(tmp_path):
    coco = {"images": [{"id": k, "file_name": "a.png"} for k in (1, 2)], "categories": [], "annotations": []}
    (tmp_path / "b.json").write_text(json.dumps(coco))
    with pytest.raises(ValueError, match="b.json cannot be read as COCO's JSON .*two pictures are called a"):
        Annotations(tmp_path / "b.json", pictures(tmp_path))


def test_labels_beside_each_split_are_found_and_a_readme_is_none(domain, tmp_path):
    "Another layout of YOLO: train/images beside train/labels."
    for split in SPLITS:
        for kind in ("images", "labels"):
            (tmp_path / split).mkdir(exist_ok=True)
            (tmp_path / split / kind).symlink_to(domain / kind / split)
    (tmp_path / "data.yaml").write_text("names: [disc, square]")
    (tmp_path / "README.txt").write_text("where these come from")
    (tmp_path / ".idea").mkdir()
    (tmp_path / ".idea" / "misc.xml").write_text("<project/>")
    faces, usual = find_faces(tmp_path), find_faces(domain)
    assert {split: len(faces.names(split)) for split in SPLITS} == SPLITS
    for split in SPLITS:
        pairs = zip(drawn_boxes(faces)(None, faces.names(split)), drawn_boxes(usual)(None, usual.names(split)))
        assert all(np.array_equal(one.boxes, other.boxes) for one, other in pairs)


@pytest.mark.parametrize("layout", ["annotations/instances_{}.json", "{}/_annotations.coco.json"])
def test_files_of_coco_are_found_where_its_tools_leave_them(domain, other_layouts, tmp_path, layout):
    whole = json.loads((other_layouts / "coco.json").read_text())
    for split in SPLITS:
        (tmp_path / split).mkdir()
        images = [image for image in whole["images"] if image["file_name"].startswith(split)]
        named = [image | {"file_name": image["file_name"].replace("/", "-")} for image in images]
        for image, plain in zip(images, named):
            (tmp_path / split / plain["file_name"]).symlink_to(domain / "images" / image["file_name"])
        things = [thing for thing in whole["annotations"] if thing["image_id"] in {image["id"] for image in images}]
        (place := tmp_path / layout.format(split)).parent.mkdir(exist_ok=True)
        place.write_text(json.dumps(whole | {"images": named, "annotations": things}))
    (tmp_path / "README.roboflow.txt").write_text("about the pictures")
    faces, usual = find_faces(tmp_path), find_faces(domain)
    for split in SPLITS:
        pairs = zip(drawn_boxes(faces)(None, faces.names(split)), drawn_boxes(usual)(None, usual.names(split)))
        for one, other in pairs:
            np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-3)
            assert one.classes == other.classes


def test_a_domain_with_boxes_is_not_searched_for_faces(command, domain, tmp_path):
    done = command("train", "heatmap", "--preset", "own", "--data", domain, "--out", tmp_path)
    assert done.returncode == 1 and "make heatmaps of them (facesr heatmaps make --detector" in done.stderr
    assert not (tmp_path / "heatmaps").exists()


def test_an_entity_that_grows_without_end_is_refused(tmp_path):
    "A page of XML whose ten lines would be gigabytes of text."
    lines = ['<!ENTITY a0 "aaaaaaaaaa">'] + [f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 12)]
    (tmp_path / "a.xml").write_text(
        f"<!DOCTYPE annotation [{''.join(lines)}]><annotation><object><name>&a11;</name></object></annotation>"
    )
    with pytest.raises(ValueError, match="a.xml cannot be read as Pascal VOC"):
        Annotations(tmp_path, pictures(tmp_path))
