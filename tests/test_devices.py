"More than one process, and less than full precision."

import subprocess
from pathlib import Path

import pytest
import torch
from conftest import BUNDLED, FACESR, ROOT
from safetensors.torch import load_file

from facesr.model import SuperResolutionUNet


def test_two_processes_train_what_one_does(facesr, tmp_path):
    "DDP over two CPU processes takes the same steps as one process, up to rounding; heads, heatmaps and all."
    command = [
        "train",
        "deep",
        "--preset",
        "smoke",
        "--set",
        "epochs=1",
        "--set",
        "perceptual_weight=0",
        "--set",
        "warmup_steps=0",
        "--set",
        "ema_decay=0",
    ]  # steps that are felt
    launch = [
        str(Path(FACESR).with_name("accelerate")),
        "launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        FACESR,
    ]
    two = subprocess.run(
        [*launch, *command, "--out", str(tmp_path / "two")],
        cwd=ROOT,
        env=facesr.environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("epoch 1/1 done") == 1  # one process speaks
    one = facesr(*command, "--out", tmp_path / "one")
    assert one.returncode == 0, one.stderr
    a, b = (load_file(tmp_path / name / "smoke" / "deep" / "seed0" / "model.safetensors") for name in ("one", "two"))
    torch.manual_seed(0)
    start = SuperResolutionUNet(width=16, blocks=1).state_dict()
    apart, moved = (max((a[name] - other[name]).abs().max() for name in a) for other in (b, start))
    assert apart < 2e-4 < 5e-3 < moved, (apart, moved)


def test_bfloat16_trains(facesr, tmp_path):
    result = facesr(
        "train", "deep", "--preset", "smoke", "--set", "epochs=1", "--set", "mixed_precision=bf16", "--out", tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "nan" not in result.stdout


def test_fp16_without_a_gpu_is_refused(facesr, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = facesr("train", "--preset", "smoke", "--set", "mixed_precision=fp16", "--out", tmp_path)
    assert result.returncode == 1 and "which needs a GPU" in result.stderr.strip().splitlines()[-1]


def test_another_degradation_reaches_training_and_evaluation(tmp_path):
    from facesr.degradation import degrade, to_uint8
    from facesr.metrics import consistency
    from facesr.study import resolve
    from facesr.metrics import predict
    from facesr.training import Trainer, best_model, finish, fit

    trainer = Trainer(
        resolve(preset="smoke", degradation="area", epochs=1, perceptual_weight=0),
        BUNDLED,
        tmp_path,
        report=lambda line: None,
    )
    from PIL import Image

    hr = Image.fromarray(trainer.pixels["train"].levels[128][0].permute(1, 2, 0).numpy())
    expected = (
        torch.frombuffer(bytearray(degrade(hr, "area").tobytes()), dtype=torch.uint8).view(16, 16, 3).permute(2, 0, 1)
    )
    assert torch.equal(trainer.pixels["train"].levels[16][0], expected)
    fit(trainer)
    table, test = finish(trainer), trainer.pixels["test"]
    _, sr, _, lr = next(iter(predict(best_model(trainer), test)))
    assert table["consistency"][: len(sr)].tolist() == pytest.approx(
        consistency(to_uint8(sr), lr, "area").tolist(), abs=1e-3
    )
    assert table["consistency"][: len(sr)].tolist() != pytest.approx(
        consistency(to_uint8(sr), lr).tolist(), abs=1e-2
    )  # the study's degradation says something else
