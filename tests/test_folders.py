"Folders as sets of faces come: splits, a folder a person, thousands of folders, masks beside photographs."

import os
import shutil
import zlib

import numpy as np
import pandas as pd
import pytest
from conftest import BUNDLED
from PIL import Image

from facesr.detection import bundled_detector
from facesr.faces import find_faces, read_pixels, SPLITS
from facesr.heatmaps import BUNDLED_PARTS, Recipe
from facesr.images import IMAGE_SUFFIXES
from facesr.store import HeatmapStore, make_heatmaps

PHOTOGRAPHS = sorted((BUNDLED / "img_align_celeba").iterdir())


@pytest.fixture(scope="module", autouse=True)
def ultralytics():
    "Loaded, as it is after any detection: it puts a function of its own in the place of PIL's Image.open."
    bundled_detector()


def filled(root, *paths):
    "Photographs, every one another, under these paths."
    for path, photograph in zip(paths, PHOTOGRAPHS, strict=False):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photograph, root / path)
    return root


def split_of(faces):
    return dict(zip(faces.table["name"], faces.table["split"]))


@pytest.mark.parametrize(
    "train, val, test",
    [("train", "val", "test"), ("training", "validation", "testing"), ("Train", "valid", "Test")],
)
@pytest.mark.parametrize("above", ["", "archive/data/"])
def test_folders_called_train_val_and_test_are_splits(tmp_path, above, train, val, test):
    names = [f"{train}/{i}.jpg" for i in range(12)] + [f"{val}/0.jpg"] + [f"{test}/images/{i}.jpg" for i in range(3)]
    faces = find_faces(filled(tmp_path, *(above + name for name in names)))
    assert faces.images == tmp_path / above and split_of(faces) == {
        name: {train: "train", val: "val", test: "test"}[name.split("/")[0]] for name in names
    }
    assert str(faces).endswith("12 train, 1 val, 3 test; split by its folders")
    assert read_pixels(faces.images, faces.names("test")).names == [f"{test}/images/{i}.jpg" for i in range(3)]


def test_people_and_equal_files_in_several_splits_are_said(tmp_path):
    names = [f"train/Person {i}/1.jpg" for i in range(12)] + ["val/Person 3/2.jpg", "test/Zoe/1.jpg"]
    filled(tmp_path, *names)
    shutil.copy(tmp_path / names[0], tmp_path / "test" / "Zoe" / "2.jpg")
    faces = find_faces(tmp_path)
    assert "; 13 people, a folder each; people in more than one split: 1; images in more than one" in str(faces)
    assert len(set(faces.people(names))) == 13
    assert faces.people(["train/Person 3/1.jpg"]) == faces.people(["val/Person 3/2.jpg"])


@pytest.mark.parametrize("name", ["Aaron_Eckhart_{}/Aaron_Eckhart_{:04}.jpg", "n{:06}/{:04}_01.jpg", "{:07}/{:03}.jpg"])
@pytest.mark.parametrize("above", ["", "lfw/lfw_funneled/"])
def test_a_folder_a_person_gives_people_who_are_whole_in_one_split(tmp_path, name, above):
    paths = [name.format(person, i) for person in range(20) for i in range(1 + person % 4)]
    faces = find_faces(filled(tmp_path, *(above + path for path in paths)))
    assert faces.table["name"].tolist() == sorted(paths) and str(faces).endswith("; 20 people, a folder each")
    folders = dict(zip(faces.table["name"].str.split("/").str[0], faces.table["person"]))
    assert list(folders.values()) == list(range(20))
    assert faces.people(paths) == [folders[path.split("/")[0]] for path in paths]
    by_person = faces.table.groupby("person")["split"].nunique()
    assert len(by_person) == 20 and by_person.max() == 1
    assert all(faces.names(split) for split in SPLITS)


@pytest.mark.parametrize("name", ["images1024x1024/{:05}/{:05}.png", "{:05}/img{:08}.png"])
def test_thousands_of_numbered_folders_are_one_set(tmp_path, name):
    names = [name.format(i // 4 * 1000, i // 4 * 1000 + i % 4) for i in range(24)]
    faces = find_faces(filled(tmp_path, *names))
    assert len(faces.table) == 24 and set(faces.table["person"]) == {-1}
    assert str(faces).endswith("20 train, 2 val, 2 test; numbered folders are one set")


def celebamask(root, photographs=12, mode="L"):
    names = [f"CelebA-HQ-img/{i}.jpg" for i in range(photographs)]
    filled(root, *names)
    for i in range(photographs):
        for part in ("skin", "l_brow", "hair"):
            path = root / "CelebAMask-HQ-mask-anno" / str(i // 5) / f"{i:05}_{part}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            mask = np.zeros((512, 512), np.uint8)
            mask[100 + i : 300, 50:200] = 255
            Image.fromarray(mask).convert(mode).save(path)
    return root


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1"])
def test_masks_are_no_photographs(tmp_path, mode):
    faces = find_faces(celebamask(tmp_path / "CelebAMask-HQ", mode=mode))
    assert faces.images.name == "CelebA-HQ-img" and len(faces.table) == 12
    assert str(faces).endswith("10 train, 1 val, 1 test; 36 masks in CelebAMask-HQ-mask-anno are left out")
    with pytest.raises(ValueError, match="holds 36 masks and no photographs"):
        find_faces(tmp_path / "CelebAMask-HQ" / "CelebAMask-HQ-mask-anno")


def enormous(path):
    "A PNG whose header promises two thousand million pixels."
    Image.new("L", (8, 8)).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = (50_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (lambda path: path.write_bytes(b"no picture"), "no image that can be decoded"),
        (lambda path: path.write_bytes(b""), "no image that can be decoded"),
        (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"), "no image that can be decoded"),
        (enormous, "more than 50,000,000 pixels"),
        (os.mkfifo, "is no file but a folder, pipe, socket or device"),
        (lambda path: path.symlink_to(path.name), "symbolic links"),
    ],
)
@pytest.mark.parametrize("name", ["photos/{}.png", "photos/{}_mask.png"])
def test_a_png_that_cannot_be_decoded_is_no_mask_and_is_named_when_it_is_read(tmp_path, name, spoil, sentence):
    names = [name.format(i) for i in range(3)]
    filled(tmp_path, *(f"photos/{i}.jpg" for i in range(12)))
    for path in names:
        spoil(tmp_path / path)
    faces = find_faces(tmp_path)
    assert len(faces.table) == 15
    with pytest.raises(ValueError, match=f"3 of 3 images cannot be read .*{sentence}"):
        read_pixels(tmp_path, names)


def test_masks_in_one_folder_with_their_photographs_are_left_out(tmp_path):
    filled(tmp_path, *(f"{i}.png" for i in range(12)))
    for i in range(12):
        Image.new("P", (256, 256), i).save(tmp_path / f"{i}_mask.png")
    faces = find_faces(tmp_path)
    assert faces.table["name"].tolist() == sorted(f"{i}.png" for i in range(12))
    assert str(faces).endswith(f"; 12 masks in {tmp_path.name} are left out")


def test_masks_by_their_channel(tmp_path):
    filled(tmp_path, *(f"photos/{i}.jpg" for i in range(12)))
    (tmp_path / "labels").mkdir()
    for i in range(12):
        Image.fromarray(np.kron(np.arange(16, dtype=np.uint8).reshape(4, 4), np.ones((32, 32), np.uint8)) + i).save(
            tmp_path / "labels" / f"{i}.png"
        )
    faces = find_faces(tmp_path)
    assert faces.images.name == "photos" and str(faces).endswith("; 12 masks in labels are left out")


@pytest.mark.parametrize(
    "names, sentence",
    [
        (
            [f"{i}.jpg" for i in range(12)] + [f"crops/{i}.jpg" for i in range(20)],
            r"2 places, and which are meant is not known: crops \(20\), the folder itself \(12\); name the one",
        ),
        (
            [f"aligned/{i}.jpg" for i in range(12)] + [f"raw/{i}.jpg" for i in range(14)],
            r"2 places, .*: raw \(14\), aligned \(12\); name the one that is meant, or take out the others",
        ),
        (
            [f"train/{i}.jpg" for i in range(12)] + ["test/1.jpg"] + [f"extra/{i}.jpg" for i in range(14)],
            r"3 places, .*: extra \(14\), train \(12\), test \(1\); beside test, train there can be no other images",
        ),
        (
            [f"train/real/{i}.jpg" for i in range(12)] + [f"train/fake/{i}.jpg" for i in range(9)] + ["test/1.jpg"],
            r"train has images in 2 places, .*: real \(12\), fake \(9\)",
        ),
    ],
)
def test_where_several_folders_may_be_meant_all_counts_are_named(tmp_path, names, sentence):
    with pytest.raises(ValueError, match=sentence):
        find_faces(filled(tmp_path, *names))


def table(root, names):
    (root / "list_eval_partition.txt").write_text("".join(f"{name} {i % 3}\n" for i, name in enumerate(names)))


def test_a_partial_aligned_folder_beside_the_photographs_before_alignment(tmp_path):
    names = [f"{i:06}.jpg" for i in range(1, 13)]
    filled(tmp_path, *(f"Img/img_celeba/{name}" for name in names))
    filled(tmp_path, *(f"Img/img_align_celeba/{name}" for name in names[:5]))
    table(tmp_path, names)
    sentence = r"Img/img_celeba \(12\), Img/img_align_celeba \(5\); take out all but the one"
    with pytest.raises(ValueError, match=sentence):
        find_faces(tmp_path)
    filled(tmp_path, *(f"Img/img_align_celeba/{name}" for name in names))
    assert find_faces(tmp_path).images.name == "img_align_celeba"


def test_a_partition_finds_its_images_beside_fuller_folders(tmp_path):
    names = [f"{i:06}.jpg" for i in range(1, 13)]
    filled(tmp_path, *(f"img_align_celeba/{name}" for name in names), "img_align_celeba/more.jpg")
    filled(tmp_path, *(f"other/{i}.jpg" for i in range(30)))
    table(tmp_path, names)
    faces = find_faces(tmp_path)
    assert faces.images.name == "img_align_celeba" and len(faces.table) == 12
    assert str(faces).endswith("; not named in the partition and left out: 1")


def test_a_partition_may_name_paths(tmp_path):
    names = [f"P{i}/1.jpg" for i in range(12)]
    table(filled(tmp_path, *(f"lfw/{name}" for name in names)), names)
    faces = find_faces(tmp_path)
    assert faces.images == tmp_path / "lfw" and faces.names("test") == sorted(names[2::3])


@pytest.mark.parametrize("copy", [shutil.copy, lambda a, b: os.symlink(a, b), lambda a, b: os.link(a, b)])
def test_equal_files_are_in_one_split(tmp_path, copy):
    names = [f"{i}.jpg" for i in range(40)]
    filled(tmp_path, *names)
    alone = split_of(find_faces(tmp_path))
    for name in names:
        copy(tmp_path / name, tmp_path / f"copy of {name}")
    faces = find_faces(tmp_path)
    found = split_of(faces)
    assert all(found[name] == found[f"copy of {name}"] for name in names)
    assert [list(found.values()).count(split) for split in SPLITS] == [64, 8, 8]
    assert str(faces).endswith("; equal files, kept in one split: 80")
    for name in names:
        (tmp_path / f"copy of {name}").unlink()
    assert split_of(find_faces(tmp_path)) == alone


def save_as_heic(picture, path):
    import pillow_heif

    pillow_heif.from_pillow(picture).save(path)


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_pictures_of_every_kind_are_faces(tmp_path, suffix):
    "They are found, read as what they show, and equal ones are seen."
    names = [f"{i:02}{suffix}" for i in range(12)]
    for name, photograph in zip(names, PHOTOGRAPHS):
        picture = Image.open(photograph)
        save_as_heic(picture, tmp_path / name) if suffix in (".heic", ".heif") else picture.save(tmp_path / name)
    shutil.copy(tmp_path / names[3], tmp_path / f"copy{suffix}")
    faces = find_faces(tmp_path)
    assert len(faces.table) == 13 and str(faces).endswith("; equal files, kept in one split: 2")
    found = read_pixels(tmp_path, names).levels[128].float()
    meant = read_pixels(BUNDLED / "img_align_celeba", [path.name for path in PHOTOGRAPHS[:12]]).levels[128]
    assert (found - meant).abs().mean() < 6


def test_copies_of_few_photographs_are_too_few(tmp_path):
    for i in range(30):
        shutil.copy(PHOTOGRAPHS[i % 3], tmp_path / f"{i}.jpg")
    with pytest.raises(ValueError, match="found 30 images, of which only 3 are different files or people; a folder"):
        find_faces(tmp_path)


def test_people_of_a_table_are_whole_in_one_split(tmp_path):
    filled(tmp_path, *(f"{i:02}.jpg" for i in range(60)))
    (tmp_path / "identity_CelebA.txt").write_text("".join(f"{i:02}.jpg {i // 3 + 100}\n" for i in range(60)))
    faces = find_faces(tmp_path)
    assert faces.people(["00.jpg", "59.jpg"]) == [100, 119]
    assert faces.table.groupby("person")["split"].nunique().max() == 1


def test_linked_folders_count_and_rings_end(tmp_path):
    filled(tmp_path / "disk", *(f"{i}.jpg" for i in range(12)))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "faces").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "ring").symlink_to(tmp_path / "data")
    (tmp_path / "disk" / "itself.jpg").symlink_to("itself.jpg")
    assert len(find_faces(tmp_path / "data").table) == 13  # who reads the last one will say what it is


@pytest.mark.parametrize("table", ["per_image.csv", "per_image.csv.xz"])
def test_pictures_of_runs_are_no_faces(tmp_path, table):
    filled(tmp_path, *(f"{i}.jpg" for i in range(12)), "results/smoke/baseline/seed0/shown.webp")
    (tmp_path / "results/smoke/baseline/seed0" / table).touch()
    assert len(find_faces(tmp_path).table) == 12


def test_names_with_folders_work_in_a_store_and_in_tables(tmp_path):
    filled(tmp_path / "lfw", *(f"Person {i}/{j}.jpg" for i in range(10) for j in range(2)))
    faces = find_faces(tmp_path / "lfw")
    arguments = (tmp_path / "lfw.h5", faces.images, faces.names("train"), bundled_detector(), Recipe(BUNDLED_PARTS))
    make_heatmaps(*arguments)
    store, pixels = HeatmapStore(tmp_path / "lfw.h5"), read_pixels(faces.images, faces.names("train"))
    store.check(pixels.names, pixels.levels[128])
    assert len(store.maps(pixels.names)) == len(pixels.names)
    faces.table.to_csv(tmp_path / "t.csv", index=False)
    assert pd.read_csv(tmp_path / "t.csv")["name"].tolist() == faces.table["name"].tolist()
