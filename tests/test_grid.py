"Grids of runs: controls and seeds, failures among them, and workers that die."

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import BUNDLED, ROOT

from facesr import execution
from facesr.cli import study_command
from facesr.study import resolve
from facesr.training import train


def test_one_failure_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    made = []

    def run(variant, *rest):
        if variant == "heatmap":
            raise RuntimeError("out of luck")
        made.append(variant)

    monkeypatch.setattr(execution, "run_notebook", run)
    monkeypatch.setattr(execution, "execute", lambda *a: None)
    monkeypatch.setattr("facesr.reporting.write_report", lambda *a: None)
    with pytest.raises(RuntimeError, match="1 of 9 runs failed: heatmap \\(seed 3\\): out of luck"):
        study_command("smoke", seed=3, seeds=1, controls=True, out=tmp_path, notebooks=ROOT / "nbs")
    assert made == ["baseline", "multiscale", "deep", "uniform", "edges", "shuffled", "mean", "squared"]
    assert "heatmap (seed 3) failed: out of luck" in capsys.readouterr().err


@pytest.mark.parametrize(
    "controls, trained", [("1", True), ("yes", True), ("true", True), ("0", False), ("no", False), ("", False)]
)
def test_make_trains_the_controls_where_it_is_told_to(controls, trained):
    told = subprocess.run(
        ["make", "--dry-run", "study", f"CONTROLS={controls}"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert told.returncode == 0 and ("--controls" in told.stdout) == trained


def test_make_refuses_what_is_neither_yes_nor_no():
    told = subprocess.run(
        ["make", "--dry-run", "study", "CONTROLS=maybe"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (
        told.returncode == 2
        and "CONTROLS is 'maybe'; allowed are 1, yes, true" in told.stderr
        and "--preset" not in told.stdout
    )


def test_a_run_that_dask_gives_up_is_named(monkeypatch, capsys):
    distributed = pytest.importorskip("dask.distributed")

    class GivenUp(distributed.Client):
        def submit(self, run, variant, **options):
            future = super().submit(run, variant, **options)
            if variant == "heatmap":
                future.cancel()
            return future

    monkeypatch.setattr(distributed, "Client", GivenUp)
    monkeypatch.setattr(execution, "run_notebook", len)  # a run that is over at once
    runs = {f"{variant} (seed 0)": (variant,) for variant in ("baseline", "heatmap")}
    with distributed.LocalCluster(n_workers=1, processes=False, dashboard_address=None) as cluster:
        failed = execution.run_on_cluster(runs, scheduler=cluster.scheduler_address)
    assert failed == {"heatmap (seed 0)": "Dask says it is cancelled; start again"}
    said = capsys.readouterr()
    assert said.out == "baseline (seed 0) done\n" and said.err.startswith("heatmap (seed 0) failed: ")


def test_a_scheduler_that_is_not_there_is_named(facesr, tmp_path):
    done = facesr("study", "--preset", "smoke", "--scheduler", "tcp://127.0.0.1:9", "--out", tmp_path)
    assert done.returncode == 1 and "tcp://127.0.0.1:9" in done.stderr.strip().splitlines()[-1]


TWO_RUNS = """
import sys
from pathlib import Path
from facesr.execution import run_on_cluster
if __name__ == "__main__":
    where = None, Path(sys.argv[1]), Path(sys.argv[2])
    failed = run_on_cluster({f"{v} (seed 0)": (v, "smoke", 0, *where) for v in ("baseline", "uniform")}, workers=2)
    sys.exit(str(failed) if failed else 0)
"""


def kernel_of(state, process):
    "The kernel below `process` that holds the lock of the run whose checkpoint this is."
    below = psutil.Process(process.pid).children(recursive=True)
    kernels = [p for p in below if "ipykernel_launcher" in " ".join(p.cmdline())]
    return next((k for k in kernels if any(str(state.parent) in f.path for f in k.open_files())), None)


def test_a_worker_that_is_killed_costs_nothing_that_was_saved(tmp_path, scratch):
    "A Dask worker is killed while it trains; its run goes on elsewhere from the checkpoint, to the same bits."
    environment = {name: value for name, value in os.environ.items() if name != "FACESR_CELEBA"}
    environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TMPDIR": scratch}
    study = [sys.executable, "-c", TWO_RUNS, str(tmp_path / "killed"), str(ROOT / "nbs")]
    log = open(tmp_path / "log", "w+")
    process = subprocess.Popen(study, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    killed = None
    while killed is None:
        assert process.poll() is None, (tmp_path / "log").read_text()
        for state in (tmp_path / "killed" / "smoke").glob("*/seed0/checkpoint/state.pt"):
            if kernel := kernel_of(state, process):
                killed = state.parent.parent.parent.name
                worker = kernel.parent()
                kernel.send_signal(signal.SIGKILL)
                worker.send_signal(signal.SIGKILL)
                break
        time.sleep(0.02)
    assert process.wait(timeout=900) == 0, (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text()
    assert f"{killed} (seed 0) done" in said and said.count("continuing seed0 at step") == 1

    train(resolve(killed, "smoke"), BUNDLED, tmp_path / "whole", lambda line: None)
    runs = [tmp_path / which / "smoke" / killed / "seed0" for which in ("killed", "whole")]
    assert len({(run / "model.safetensors").read_bytes() for run in runs}) == 1
    assert len({(run / "per_image.csv").read_bytes() for run in runs}) == 1
    complete = sorted(p.parts[-3] for p in (tmp_path / "killed" / "smoke").glob("*/seed0/metrics.json"))
    assert complete == ["baseline", "uniform"]
    assert json.loads((runs[0] / "config.json").read_text())["threads"] == 1
