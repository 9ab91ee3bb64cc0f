"A run that is killed, and one that is not, end with the same bits."

import json
import os
import signal
import subprocess
import time

import pandas as pd
import pytest
import torch
from conftest import FACESR, ROOT

SMOKE = ("train", "heatmap", "--preset", "smoke", "--set", "epochs=4", "--set", "checkpoint_minutes=0")


def start(facesr, out):
    return subprocess.Popen(
        [FACESR, *SMOKE, "--out", str(out)], cwd=ROOT, env=facesr.environment, stdout=subprocess.DEVNULL
    )


def step_of(checkpoint):
    return torch.load(checkpoint, weights_only=True)["loop"]["steps"] if checkpoint.exists() else 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The run that nothing disturbed."
    out = tmp_path_factory.mktemp("whole")
    environment = {name: value for name, value in os.environ.items() if name != "FACESR_CELEBA"}
    subprocess.run([FACESR, *SMOKE, "--out", str(out)], cwd=ROOT, env=environment, check=True, timeout=900)
    return out / "smoke" / "heatmap" / "seed0"


def test_a_killed_run_ends_with_the_same_bits(facesr, whole, tmp_path):
    run = tmp_path / "smoke" / "heatmap" / "seed0"
    checkpoint = run / "checkpoint" / "state.pt"
    for at_least in (3, 9):  # in the middle of the first epoch, and of the third
        process = start(facesr, tmp_path)
        while step_of(checkpoint) < at_least:
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (run / "metrics.json").exists()  # absent or resumable, never half complete
    assert start(facesr, tmp_path).wait(timeout=900) == 0

    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (run / "per_image.csv").read_bytes() == (whole / "per_image.csv").read_bytes()
    unlike = ["seconds", "faces_per_second"]
    pd.testing.assert_frame_equal(
        *(pd.read_csv(r / "history.csv").drop(columns=unlike) for r in (run, whole)), check_exact=True
    )
    metrics = [json.loads((r / "metrics.json").read_text()) | {"training_seconds": 0} for r in (run, whole)]
    assert metrics[0] == metrics[1]


def test_a_complete_run_is_left_alone(facesr, whole):
    before = {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}
    result = facesr(*SMOKE, "--out", whole.parents[2])
    assert result.returncode == 0 and "epoch" not in result.stdout
    assert {path.name: path.stat().st_mtime_ns for path in whole.iterdir()} == before


def test_a_full_disk_costs_nothing_that_was_saved(facesr, tmp_path):
    "Files are limited to a size the checkpoint does not fit in: writing fails as on a full disk."
    checkpoint = tmp_path / "smoke" / "baseline" / "seed0" / "checkpoint" / "state.pt"
    limited = subprocess.run(
        [
            "bash",
            "-c",
            'ulimit -f 100; exec "$@"',
            "limited",
            FACESR,
            "train",
            "baseline",
            *SMOKE[2:],
            "--out",
            str(tmp_path),
        ],
        cwd=ROOT,
        env=facesr.environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert limited.returncode == 1
    last = limited.stderr.strip().splitlines()[-1]
    assert "state.pt cannot be written" in last and "make room" in last
    assert not checkpoint.exists() and not list(checkpoint.parent.glob("*.part"))


def test_a_killed_study_goes_on(tmp_path):
    "The same through papermill: the whole process group of `facesr study` is killed, kernel included."
    environment = {name: value for name, value in os.environ.items() if name != "FACESR_CELEBA"}
    command = [FACESR, "study", "--preset", "smoke", "--out", str(tmp_path)]
    run = tmp_path / "smoke" / "heatmap" / "seed0"
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while not (run / "checkpoint" / "state.pt").exists():
        assert process.poll() is None, "the study ended before it could be killed"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert again.returncode == 0, again.stderr
    assert "baseline/seed0 is complete" in again.stdout  # nothing that was complete is repeated
    assert again.stdout.count("epoch 1/2 done") == 2     # of multiscale and deep: heatmap goes on from its first epoch
    assert (run / "train.ipynb").exists() and (tmp_path / "smoke" / "report.html").exists()
