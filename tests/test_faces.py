"Where faces come from: real CelebA, and folders that are not what they should be."

import os
import shutil

import pytest
from conftest import BUNDLED
from PIL import Image

from facesr.degradation import interpolate, to_float, to_uint8
from facesr.faces import find_faces, read_partition, read_pixels, SPLITS
from facesr.metrics import psnr


def last_line(result):
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "prepare, sentence",
    [
        (lambda folder: None, "no images in"),
        (lambda folder: (folder / "notes.txt").write_text("no face here"), "no images in"),
        (lambda folder: [(folder / f"{i}.jpg").write_bytes(b"not a jpeg") for i in range(20)], "images cannot be read"),
        (
            lambda folder: [shutil.copy(BUNDLED / "img_align_celeba" / f"{i:06}.jpg", folder) for i in range(1, 4)],
            "found 3 images; a folder without a partition file needs at least 10",
        ),
        (
            lambda folder: (
                shutil.copy(BUNDLED / "img_align_celeba" / "000001.jpg", folder),
                (folder / "list_eval_partition.csv").write_text("000001.jpg;0\n"),
            ),
            "list_eval_partition.csv, line 1",
        ),
        (
            lambda folder: (
                shutil.copy(BUNDLED / "img_align_celeba" / "000001.jpg", folder),
                (folder / "list_eval_partition.csv").write_text("000009.jpg,0\n"),
            ),
            "none of the 1 images",
        ),
        (
            lambda folder: (
                shutil.copy(BUNDLED / "img_align_celeba" / "000001.jpg", folder),
                (folder / "list_eval_partition.csv").write_text("000001.jpg,0\n"),
            ),
            "there are no val faces",
        ),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_in_one_sentence(command, tmp_path, prepare, sentence):
    data = tmp_path / "data"
    data.mkdir()
    prepare(data)
    line = last_line(command("train", "--preset", "smoke", "--data", data, "--out", tmp_path / "out"))
    assert line.startswith("error: ") and sentence in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda photograph: photograph.write_bytes(photograph.read_bytes()[:2000]), "image file is truncated"),
        (
            lambda photograph: (photograph.unlink(), os.mkfifo(photograph)),
            "is no file but a folder, pipe, socket or device",
        ),  # to open it would be to wait for ever
    ],
)
def test_a_photograph_that_cannot_be_read_is_named_and_may_be_left_out(command, tmp_path, damage, reason):
    data = tmp_path / "data"
    data.mkdir()
    for i in range(1, 61):
        shutil.copy(BUNDLED / "img_align_celeba" / f"{i:06}.jpg", data)
    victim = find_faces(data).names("train")[0]
    damage(data / victim)
    words = ("train", "--preset", "smoke", "--data", data, "--out", tmp_path / "out")
    words += ("--set", "epochs=1", "--set", "perceptual_weight=0", "--set", "train_faces=16")
    assert f"1 of 16 images cannot be read ({victim}: {reason}" in last_line(command(*words))
    result = command(*words, "--set", "skip_unreadable=true")
    assert result.returncode == 0, result.stderr
    assert f"left out 1 images that give no face: {victim} ({reason}" in result.stdout


@pytest.mark.parametrize(
    "identities, sentence",
    [
        ("000001.jpg 1\n000002.jpg 2 0.9\n", "identity_CelebA.txt, line 2: found '000002.jpg 2 0.9'"),
        ("000001.jpg 99999999999999999999\n", "identity_CelebA.txt, line 1"),
        ("someone.jpg 1\n", "identity_CelebA.txt names none of the 12 images, but for example someone.jpg"),
        ("", "identity_CelebA.txt names no image"),
    ],
)
def test_a_table_of_people_that_is_none_is_refused(tmp_path, identities, sentence):
    for i in range(1, 13):
        shutil.copy(BUNDLED / "img_align_celeba" / f"{i:06}.jpg", tmp_path)
    (tmp_path / "identity_CelebA.txt").write_text(identities)
    with pytest.raises(ValueError, match=sentence):
        find_faces(tmp_path)


def test_a_file_name_that_is_not_utf_8_is_refused(tmp_path):
    for i in range(1, 13):
        shutil.copy(BUNDLED / "img_align_celeba" / f"{i:06}.jpg", tmp_path)
    odd = os.fsencode(tmp_path) + b"/\xff" + "\U0001f600.jpg".encode()
    with (
        open(odd, "wb"),
        pytest.raises(ValueError, match="is not UTF-8, in which results are written; rename the file"),
    ):
        find_faces(tmp_path)


def test_celeba_as_it_is(celeba):
    faces = find_faces(celeba)
    assert faces.origin == "CelebA layout"
    names = {split: faces.names(split) for split in SPLITS}
    assert all(names.values()) and not set(names["train"]) & set(names["test"])
    assert "image_id" not in faces.table["name"].values  # Kaggle's header is no face
    people = {split: set(faces.people(names[split])) for split in SPLITS}
    assert not people["train"] & people["test"] and -1 not in people["test"]
    assert faces.attributes is None or "Eyeglasses" in faces.attributes
    pixels = read_pixels(faces.images, faces.names("test", 50))
    assert pixels.levels[128].shape == (50, 3, 128, 128)


def test_both_partition_files_of_celeba_say_the_same(celeba):
    files = [celeba / f"list_eval_partition.{suffix}" for suffix in ("csv", "txt")]
    if not all(file.exists() for file in files):
        pytest.skip("this copy of CelebA has only one partition file")
    assert read_partition(files[0]).equals(read_partition(files[1]))


def test_bicubic_on_celeba_is_where_the_literature_has_it(celeba):
    "Bilinear and bicubic x8 up-sampling of validation faces: about 20.7 and 21.5 dB."
    faces = find_faces(celeba)
    levels = read_pixels(faces.images, faces.names("val", 400)).levels
    for method, score in {"bilinear": 20.75, "bicubic": 21.53}.items():
        enlarged = to_uint8(interpolate(to_float(levels[16]), method))
        assert psnr(enlarged, levels[128]).mean().item() == pytest.approx(score, abs=0.2)


def test_small_photographs_are_no_targets_and_may_be_left_out(tmp_path):
    for i in range(1, 41):
        shutil.copy(BUNDLED / "img_align_celeba" / f"{i:06}.jpg", tmp_path)
    faces = find_faces(tmp_path)
    names = faces.names("train", 32)
    for name, size in zip(names, [(64, 64), (127, 218), (128, 128)]):
        Image.open(tmp_path / name).resize(size).save(tmp_path / name)
    sentence = rf"2 of 32 images are too small, the smallest is {names[0]} \(64x64 is smaller than 128x128"
    with pytest.raises(ValueError, match=sentence):
        read_pixels(tmp_path, names)
    pixels = read_pixels(tmp_path, names, skip_unreadable=True)
    assert pixels.names == names[2:] and pixels.skipped[names[0]] == "64x64 is smaller than 128x128"
