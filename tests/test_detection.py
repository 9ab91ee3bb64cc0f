"Detector weights come from anywhere: a file that is damaged or hostile ends in one sentence, and runs no code."

import json
import os
import subprocess
import sys

import pytest
import torch

from facesr.detection import BUNDLED_DETECTOR, bundled_detector, checkpoint_detector
from facesr.faces import find_faces, read_pixels


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("content", ["hostile", "truncated", "empty", "text", "dictionary"])
def test_a_bad_checkpoint_is_refused_and_not_run(tmp_path, content):
    path, touched = tmp_path / "weights.pt", tmp_path / "touched"
    if content == "hostile":
        torch.save({"model": Payload(touched)}, path)
    elif content == "dictionary":
        torch.save({"model": {"weight": torch.zeros(3)}}, path)
    elif content == "truncated":
        bundled_detector().yolo.save(path)
        path.write_bytes(path.read_bytes()[:100_000])
    else:
        path.write_text("no weights" if content == "text" else "")
    with pytest.raises(ValueError, match="weights.pt cannot be read as an Ultralytics checkpoint"):
        checkpoint_detector(path)
    assert not touched.exists()


@pytest.mark.parametrize("suffix", [".onnx", ".torchscript", ".yaml"])
def test_only_pt_files_are_read(tmp_path, suffix):
    "Ultralytics opens these without its safe loader, or builds a network of random weights."
    (tmp_path / f"mine{suffix}").write_text("nc: 2")
    with pytest.raises(ValueError, match=f"mine{suffix} is not a .pt file"):
        checkpoint_detector(tmp_path / f"mine{suffix}", ["eye"])


def test_a_network_for_another_task_is_refused(tmp_path):
    from ultralytics import YOLO

    YOLO("yolo11n-seg.yaml").save(tmp_path / "seg.pt")
    with pytest.raises(ValueError, match="is a network for 'segment'; it has to be one for 'detect'"):
        checkpoint_detector(tmp_path / "seg.pt")


def test_hostile_checkpoint_where_ultralytics_was_imported_before(tmp_path):
    touched = tmp_path / "touched"
    torch.save({"model": Payload(touched)}, tmp_path / "weights.pt")
    code = (
        "import ultralytics; from facesr.detection import checkpoint_detector; "
        f"checkpoint_detector({str(tmp_path / 'weights.pt')!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "cannot be read as an Ultralytics checkpoint" in done.stderr and not touched.exists()


def test_ultralytics_is_imported_late_and_threads_are_left_alone():
    "Ultralytics leaves one thread when it is imported before torch, and when it predicts on a CPU."
    code = (
        "import facesr.detection, facesr.heatmaps, facesr.training, sys, torch; print('ultralytics' in sys.modules); "
        "facesr.detection.bundled_detector()(torch.zeros(1, 3, 128, 128, dtype=torch.uint8)); "
        "print('ultralytics' in sys.modules, torch.get_num_threads())"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "False\nTrue 2\n"


def test_a_red_picture_is_red_for_the_network():
    "Whichever order of colours Ultralytics expects, and whatever becomes of it on the way."
    detector, seen = bundled_detector(), []
    image = torch.zeros(1, 3, 128, 128, dtype=torch.uint8)
    image[:, 0] = 255
    detector.yolo.model.model[0].register_forward_pre_hook(lambda layer, given: seen.append(given[0]))
    detector(image)
    assert seen[-1].amax((0, 2, 3)).tolist() == [1, 0, 0] == seen[-1].amin((0, 2, 3)).tolist()


def test_the_bundled_weights_are_plain_tensors_and_small():
    content = BUNDLED_DETECTOR.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} <= {"F16", "I64"}
    assert len(content) <= 6_000_000


def test_detections_on_real_faces(celeba):
    faces = find_faces(celeba)
    found = bundled_detector()(read_pixels(faces.images, faces.names("test", 100)).levels[128])
    complete = [{"eye", "nose", "mouth"} <= set(d.classes) and d.classes.count("eye") >= 2 for d in found]
    assert sum(complete) >= 95


@pytest.mark.parametrize("device", ["cpu:0", torch.device("cpu", 0)])
def test_a_device_with_a_number(device):
    "As accelerate names it where several processes train on CPUs."
    images = torch.zeros(1, 3, 128, 128, dtype=torch.uint8)
    by_name, plain = bundled_detector(device=device)(images)[0], bundled_detector()(images)[0]
    assert by_name.classes == plain.classes and (by_name.boxes == plain.boxes).all()


@pytest.mark.parametrize(
    "field, value, sentence",
    [
        ("names", {1: "eye", 2: "eyebrow", 3: "nose", 4: "mouth", 5: "face"}, "has the class table {1: 'eye'"),
        ("names", {str(i): name for i, name in enumerate("abcde")}, "has the class table"),
        ("names", "eye", "has the class table eye"),
        ("names", {0: 1, 1: 2, 2: 3, 3: 4, 4: 5}, "has the class table"),
        ("names", None, "has the class table None"),
        ("names", {0: "eye", 1: "eyebrow"}, "tells 5 classes apart, and names 2"),
        ("names", dict(enumerate("abcda")), "names more than one class 'a'; give each a name of its own"),
        ("names", dict(enumerate("abcdefg")), "tells 5 classes apart, and names 7"),
        ("stride", "odd", "cannot be used as a detector"),
        ("stride", None, "cannot be used as a detector"),
        ("task", ["detect"], "mine.pt "),
    ],
)
def test_a_checkpoint_with_an_odd_field_ends_in_a_sentence(tmp_path, field, value, sentence):
    yolo = bundled_detector().yolo
    setattr(yolo.model, field, value)
    torch.save({"model": yolo.model}, tmp_path / "mine.pt")
    with pytest.raises(ValueError, match=sentence):
        checkpoint_detector(tmp_path / "mine.pt")(torch.zeros(1, 3, 128, 128, dtype=torch.uint8))


def test_ultralytics_waits_for_no_other_process():
    "As `accelerate launch` would start it, of two processes: nobody else imports Ultralytics."
    code = (
        "import os, torch.distributed as dist\n"
        "dist.init_process_group('gloo', init_method='tcp://127.0.0.1:0', rank=0, world_size=1)\n"
        "os.environ.update(RANK='1', LOCAL_RANK='1', WORLD_SIZE='2')\n"
        "def barrier(*a, **k): raise SystemExit('waited for other processes')\n"
        "dist.barrier = barrier\n"
        "from facesr.detection import _ultralytics\n"
        "_ultralytics()\n"
        "print('imported', os.environ['LOCAL_RANK'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "imported 1\n", done.stderr
