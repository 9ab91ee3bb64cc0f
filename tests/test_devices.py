"More than one process, and less than full precision."

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import pytest
import torch
from conftest import BUNDLED, FACESR, ROOT, started
from safetensors.torch import load_file

from facesr import cli, training
from facesr.model import SuperResolutionUNet
from facesr.study import resolve


STEPS = ("epochs=1", "perceptual_weight=0", "warmup_steps=0", "ema_decay=0")  # steps that are felt


def command(variant, out):
    settings = [word for setting in STEPS for word in ("--set", setting)]
    return [FACESR, "train", variant, "--preset", "smoke", *settings, "--out", str(out)]


def in_two_processes(facesr, *command):
    "As the README says it for CPUs. torchrun ends both processes when one fails; a hang ends by the timeout."
    environment = facesr.environment | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with TemporaryDirectory() as logs:  # torchrun would leave its own
        launch = [str(Path(FACESR).with_name("torchrun")), "--nproc_per_node", "2", "--log_dir", logs, *command]
        return subprocess.run(launch, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("variant", ["baseline", "deep"])
def test_two_processes_train_what_one_does(variant, facesr, tmp_path):
    "DDP over two CPU processes takes the same steps as one process, up to rounding; heads, heatmaps and all."
    two = in_two_processes(facesr, *command(variant, tmp_path / "two"))
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("epoch 1/1 done") == 1  # one process speaks
    assert "Traceback" not in two.stderr and "destroy_process_group" not in two.stderr, two.stderr
    steps = dict(setting.split("=") for setting in STEPS)
    training.train(resolve(variant, "smoke", **steps), BUNDLED, tmp_path / "one", report=lambda line: None)
    runs = [tmp_path / which / "smoke" / variant / "seed0" for which in ("one", "two")]
    assert [json.loads((run / "config.json").read_text())["processes"] for run in runs] == [1, 2]
    assert sorted(p.name for p in runs[1].iterdir()) == sorted(p.name for p in runs[0].iterdir())
    a, b = (load_file(run / "model.safetensors") for run in runs)
    torch.manual_seed(0)
    start = SuperResolutionUNet(width=16, blocks=1).state_dict()
    apart, moved = (max((a[name] - other[name]).abs().max() for name in a) for other in (b, start))
    assert apart < 2e-4 < 5e-3 < moved, (apart, moved)
    history, tables = ([pd.read_csv(run / name) for run in runs] for name in ("history.csv", "per_image.csv"))
    assert history[0]["mse"].tolist() == pytest.approx(history[1]["mse"].tolist(), rel=1e-4)
    assert tables[0]["name"].equals(tables[1]["name"])
    assert tables[0]["psnr"].tolist() == pytest.approx(tables[1]["psnr"].tolist(), abs=0.02)


def test_an_error_of_one_process_ends_the_other(facesr, tmp_path):
    "The first cannot write where it is told to, which the second does not try."
    (tmp_path / "smoke").mkdir()
    (tmp_path / "smoke" / "baseline").write_text("a file in the way")
    two = in_two_processes(facesr, *command("baseline", tmp_path))
    assert two.returncode != 0 and "checkpoint cannot be written" in two.stderr


def test_bfloat16_trains(tmp_path):
    "In another process: one trains in one precision only."
    config = resolve("deep", "smoke", epochs=1, mixed_precision="bf16")
    process = started(training.train, config, BUNDLED, tmp_path)
    process.join()
    assert process.exitcode == 0
    history = pd.read_csv(tmp_path / "smoke" / "deep" / "seed0" / "history.csv")
    assert len(history) == 1 and not history.isna().any(axis=None)


def test_fp16_without_a_gpu_is_refused(monkeypatch, capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    asked = ("train", "--preset", "smoke", "--set", "mixed_precision=fp16", "--out", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["facesr", *asked])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert "which needs a GPU" in capsys.readouterr().err.strip().splitlines()[-1]


def test_another_degradation_reaches_training_and_evaluation(tmp_path):
    from facesr.degradation import degrade, to_uint8
    from facesr.metrics import consistency
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
