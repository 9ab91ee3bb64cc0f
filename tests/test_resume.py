"A run that is killed, and one that is not, end with the same bits."

import json
import subprocess
import time
from signal import SIGKILL

import pandas as pd
import pytest
import torch
from conftest import BUNDLED, FACESR, ROOT, started

from facesr.study import resolve
from facesr.training import train

SMOKE = resolve("heatmap", "smoke", epochs=4, checkpoint_minutes=0)


def step_of(checkpoint):
    return torch.load(checkpoint, weights_only=True)["loop"]["steps"] if checkpoint.exists() else 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The run that nothing disturbed, in this process."
    return train(SMOKE, BUNDLED, tmp_path_factory.mktemp("whole"), lambda line: None)


def test_a_killed_run_ends_with_the_same_bits(whole, tmp_path):
    run = tmp_path / "smoke" / "heatmap" / "seed0"
    checkpoint = run / "checkpoint" / "state.pt"
    for at_least in (3, 9):  # in the middle of the first epoch, and of the third
        process = started(train, SMOKE, BUNDLED, tmp_path)
        while step_of(checkpoint) < at_least:
            assert process.is_alive(), "the run ended before it could be killed"
            time.sleep(0.05)
        process.kill()
        process.join()
        assert process.exitcode == -SIGKILL
        assert not (run / "metrics.json").exists()  # absent or resumable, never half complete
    process = started(train, SMOKE, BUNDLED, tmp_path)
    process.join()
    assert process.exitcode == 0

    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (run / "per_image.csv").read_bytes() == (whole / "per_image.csv").read_bytes()
    unlike = ["seconds", "faces_per_second"]
    pd.testing.assert_frame_equal(
        *(pd.read_csv(r / "history.csv").drop(columns=unlike) for r in (run, whole)), check_exact=True
    )
    metrics = [json.loads((r / "metrics.json").read_text()) | {"training_seconds": 0} for r in (run, whole)]
    assert metrics[0] == metrics[1]


def test_a_complete_run_is_left_alone(whole):
    before, said = {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}, []
    assert train(SMOKE, BUNDLED, whole.parents[2], said.append) == whole
    assert said == [] and {path.name: path.stat().st_mtime_ns for path in whole.iterdir()} == before


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
            *("train", "baseline", "--preset", "smoke", "--set", "checkpoint_minutes=0"),
            *("--out", str(tmp_path)),
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
