"The report, made from runs as a user makes it: on few runs, on many, with the faces and without."

import json
import re
import shutil
import subprocess
import sys

import nbformat
import pandas as pd
import pytest
from conftest import BUNDLED, ROOT

from facesr import reporting
from facesr.degradation import INTERPOLATIONS
from facesr.runs import find_runs
from facesr.statistics import summarise

VARIANTS = ("baseline", "heatmap")


def make_report(facesr, out, executed, **environment):
    "Run the report's notebook on the smoke runs in a folder."
    parameters = ["-p", "preset", "smoke", "-p", "out", str(out)]
    command = [sys.executable, "-m", "papermill", "nbs/report.ipynb", str(executed), "--cwd", "nbs"]
    return subprocess.run(
        [*command, "--no-progress-bar", *parameters],
        cwd=ROOT,
        env=facesr.environment | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


def said(executed):
    "All Markdown that the cells of an executed notebook wrote."
    outputs = [output for cell in nbformat.read(executed, 4).cells for output in cell.get("outputs", [])]
    return "\n".join(output["data"]["text/markdown"] for output in outputs if "text/markdown" in output.get("data", {}))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


@pytest.fixture
def trained(facesr, results):
    "The folder of results with a run of two variants; made once."
    for variant in VARIANTS:
        if not (results / "smoke" / variant / "seed0" / "metrics.json").exists():
            result = facesr("train", variant, "--preset", "smoke", "--out", results)
            assert result.returncode == 0, result.stderr
    return results


@pytest.fixture
def reported(facesr, trained):
    "The executed report on these runs, with the faces; made once."
    executed = trained / "report.ipynb"
    if not executed.exists():
        result = make_report(facesr, trained, executed)
        assert result.returncode == 0, result.stderr
    return executed


def test_the_report_is_a_page(trained, reported, tmp_path):
    reporting.write_report(reported, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for word in (
        "Does the map help?",
        "facesr train uniform --preset smoke",
        "baseline",
        "heatmap",
        "bicubic",
        "bilinear",
        "LPIPS",
        "PSNR, eyes",
        "Where the attention error looks",
        "Training faces and their heatmaps",
        "What this does not show",
    ):
        assert word in page
    assert page.index("Does the map help?") < page.index("<table") < page.index("What this does not show")
    assert page.count("data:image/jpeg") >= 7 and "data:image/png" not in page
    assert page.count('<div class="wide"><table') == page.count("<table") >= 6
    for unwanted in ("Traceback", "skip_exec", str(ROOT), "<script", 'src="http', "@import", "No description has been"):
        assert unwanted not in page
    figures = {path.name for path in (trained / "smoke" / "figures").iterdir()}
    assert figures >= {f"{name}.webp" for name in ("opening", "faces", "hard_and_easy", "curves", "heatmaps", "parts")}


def test_the_report_without_the_faces(facesr, trained, reported, tmp_path):
    "What the faces gave is read from beside the report, where they were found once."
    shutil.copytree(trained / "smoke", tmp_path / "smoke", ignore=shutil.ignore_patterns("*.safetensors", "checkpoint"))
    for path in (tmp_path / "smoke").glob("*/seed0/config.json"):
        path.write_text(path.read_text().replace('"origin": "bundled"', '"origin": "CelebA layout"'))
    kept = ("map_weights.csv", "coverage.csv", "summary.csv", "comparisons.csv", "interpolation/bicubic.csv")
    before = {name: (tmp_path / "smoke" / name).read_text() for name in kept}
    result = make_report(facesr, tmp_path, tmp_path / "without.ipynb")
    assert result.returncode == 0, result.stderr
    assert {name: (tmp_path / "smoke" / name).read_text() for name in kept} == before
    assert "*Training faces and their heatmaps.*" in said(tmp_path / "without.ipynb")


def test_other_faces_than_those_of_the_runs_are_refused(facesr, trained, tmp_path):
    (tmp_path / "faces").mkdir()
    for path in sorted(BUNDLED.rglob("*.*"))[:12]:
        shutil.copy(path, tmp_path / "faces")
    result = make_report(facesr, trained, tmp_path / "report.ipynb", FACESR_CELEBA=str(tmp_path / "faces"))
    assert result.returncode == 1
    assert "baseline was tested on other faces than those found now" in result.stderr


def copy_shifted(trained, out, variant, source, seed, shift):
    "A run of another variant and seed, made of a copy: its PSNR is that of the baseline and a shift."
    run = out / "smoke" / variant / f"seed{seed}"
    left_out = shutil.ignore_patterns("checkpoint", "model.safetensors")
    shutil.copytree(trained / "smoke" / source / "seed0", run, ignore=left_out)
    table = pd.read_csv(trained / "smoke" / "baseline" / "seed0" / "per_image.csv")
    table["psnr"] += shift
    table.to_csv(run / "per_image.csv", index=False)
    changed = {"variant": variant, "seed": seed, "test": summarise(table)}
    (run / "metrics.json").write_text(json.dumps(json.loads((run / "metrics.json").read_text()) | changed))


@pytest.fixture
def many(trained, tmp_path):
    "Eight seeds of four variants: heatmap is better by one, deep worse, uniform now this and now that."
    for seed in range(8):
        little = 0.01 * (seed + 1)
        copy_shifted(trained, tmp_path, "baseline", "baseline", seed, 0.0)
        copy_shifted(trained, tmp_path, "heatmap", "heatmap", seed, 1 + little)
        copy_shifted(trained, tmp_path, "deep", "heatmap", seed, -1 - little)
        copy_shifted(trained, tmp_path, "uniform", "baseline", seed, -little if seed % 2 else little)
    return tmp_path


def test_the_report_on_several_seeds_and_controls(facesr, many):
    "Runs of other seeds are copies with known shifts, so what the report has to say is known."
    result = make_report(facesr, many, many / "report.ipynb")
    assert result.returncode == 0, result.stderr
    text = said(many / "report.ipynb")

    def sentence(variant, reference):
        return next(line for line in text.splitlines() if line.startswith(f"- PSNR, {variant} against {reference}"))

    assert "**Better** over seeds" in sentence("heatmap", "baseline")
    assert "heatmap is better in 100% of the pairs of runs" in sentence("heatmap", "baseline")
    assert "**Worse** over seeds" in sentence("deep", "baseline")
    assert "**No difference is shown** over seeds" in sentence("uniform", "baseline")
    assert "**Better** over seeds: p = 0.008;" in sentence("heatmap", "uniform")  # the first question: as if alone
    assert "**Primary: against uniform**" in text and "One seed each" not in text
    assert "In the whole image the map gains PSNR: `heatmap` minus `uniform` is +1.0" in text
    assert "Or only the absolute error?** In the whole image no difference is shown" in text
    assert (many / "smoke" / "figures" / "confound.webp").stat().st_size > 5_000
    table = pd.read_csv(many / "smoke" / "comparisons.csv").set_index(["variant", "reference", "metric"])
    row = table.loc[("heatmap", "baseline", "psnr")]
    assert row["difference"] == pytest.approx(1.045, abs=1e-4)
    assert row["p"] == pytest.approx(2 / 2**8)


def test_the_report_on_one_variant(facesr, trained, tmp_path):
    left_out = shutil.ignore_patterns("checkpoint")
    shutil.copytree(trained / "smoke" / "baseline", tmp_path / "smoke" / "baseline", ignore=left_out)
    result = make_report(facesr, tmp_path, tmp_path / "report.ipynb")
    assert result.returncode == 0, result.stderr
    text = said(tmp_path / "report.ipynb")
    assert "There is one variant only: nothing to compare." in text
    assert "Does the map help?** Not answered: there are runs of one variant only." in text
    assert not (tmp_path / "smoke" / "comparisons.csv").exists()


def test_the_published_reports_miss_no_number():
    for path in (ROOT / "results").glob("*/report.html"):
        text = re.sub(r'"data:[^"]*"', "", path.read_text())
        assert not re.search(r"\bnan(?:\b|%)", text), path


# Damaged tables


def cut(path, rows=slice(None), columns=slice(None)):
    "Rewrites a table with some of its lines and cells, the header among them."
    lines = [",".join(line.split(",")[columns]) for line in path.read_text().splitlines()[rows]]
    path.write_text("\n".join(lines) + "\n")


def put(path, row, column, text):
    "Rewrites one cell; row 0 is the header."
    lines = [line.split(",") for line in path.read_text().splitlines()]
    lines[row][lines[0].index(column)] = text
    path.write_text("\n".join(map(",".join, lines)) + "\n")


def swap(path, columns=None):
    "Rows 1 and 2 change places; or only these cells do."
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    columns = columns or list(table)
    table.loc[[0, 1], columns] = table.loc[[1, 0], columns].to_numpy()
    table.to_csv(path, index=False)


DAMAGE = {
    "a row gone": (lambda path: cut(path, rows=slice(0, -1)), "it has 7 rows, and the run was tested on 8 faces"),
    "the header gone": (lambda path: cut(path, rows=slice(1, None)), "it has no column 'name'"),
    "a column gone": (lambda path: cut(path, columns=slice(0, -1)), "it has no column 'ms_ssim_published'"),
    "a cell of the header gone": (lambda path: put(path, 0, "psnr", "x"), "it has no column 'psnr'"),
    "a row twice": (lambda path: path.write_text(path.read_text() + path.read_text().splitlines()[-1]), "twice"),
    "rows swapped": (swap, "not those of the test faces in the order of their names"),
    "names swapped": (lambda path: swap(path, ["name"]), "not those of the test faces in the order of their names"),
    "values swapped": (lambda path: swap(path, ["psnr", "ssim"]), "when it was made: it was changed"),
    "another number": (lambda path: put(path, 3, "lpips_vgg", "0.01"), "when it was made: it was changed"),
    "infinite": (lambda path: put(path, 3, "psnr", "inf"), "row 3 has 'inf' as psnr, where a number has to be"),
    "nothing": (lambda path: put(path, 3, "ssim", ""), "row 3 has nothing as ssim, where a number has to be"),
    "a text": (lambda path: put(path, 3, "psnr", "2l.5"), "row 3 has '2l.5' as psnr, where a number has to be"),
    "an endless text": (lambda path: put(path, 3, "psnr", "9x" * 100_000), "row 3 has '9x9x"),
    "an endless name": (lambda path: put(path, 3, "name", "x" * 200_000), "not those of the test faces"),
    "not UTF-8": (lambda path: path.write_bytes(path.read_text().encode("utf-16")), "codec can't decode"),
    "empty": (lambda path: path.write_text(""), "No columns to parse"),
    "an open quote": (lambda path: put(path, 3, "name", '"a'), "EOF inside string"),
    "absent": (lambda path: path.unlink(), "No such file"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
def test_a_damaged_table_is_refused(trained, tmp_path, damage, first):
    "Whether it is the table of the first run or of another."
    left_out = shutil.ignore_patterns("checkpoint", "*.safetensors", "figures")
    shutil.copytree(trained / "smoke", tmp_path / "smoke", ignore=left_out)
    runs = find_runs(tmp_path, "smoke")
    assert [len(seeds[0]) for seeds in reporting.read_tables(runs).values()] == [8, 8]
    path, (change, sentence) = runs[not first].folder / "per_image.csv", DAMAGE[damage]
    change(path)
    with pytest.raises(ValueError) as refused:
        reporting.read_tables(runs)
    assert str(refused.value).startswith(f"{path} cannot be used (") and sentence in str(refused.value)
    assert str(refused.value).endswith(f"restore it, or remove the folder {path.parent} to make the run again")


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda path: cut(path, rows=slice(0, -1)), "its rows are not the epochs 1 to 2"),
        (lambda path: cut(path, rows=slice(1, None)), "it has no column 'epoch'"),
        (lambda path: put(path, 0, "mse", "x"), "it has no column 'mse'"),
        (lambda path: put(path, 1, "val_psnr", "many"), "row 1 has 'many' as val_psnr"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "codec can't decode"),
    ],
)
def test_a_damaged_history_is_refused(trained, tmp_path, change, sentence):
    shutil.copytree(trained / "smoke" / "baseline", tmp_path / "smoke" / "baseline")
    (run,) = find_runs(tmp_path, "smoke")
    change(run.folder / "history.csv")
    with pytest.raises(ValueError) as refused:
        reporting.read_histories([run])
    assert sentence in str(refused.value) and f"remove the folder {run.folder}" in str(refused.value)


def test_the_published_tables_are_those_of_the_runs():
    home = ROOT / "results" / "celeba"
    runs = find_runs(ROOT / "results", "celeba")
    assert {len(table) for seeds in reporting.read_tables(runs).values() for table in seeds.values()} == {2500}
    assert len(reporting.read_histories(runs)) == sum(run.config["epochs"] for run in runs)
    assert {len(reporting.read_interpolation(home, method, runs[0])) for method in INTERPOLATIONS} == {2500}
    for name in ("coverage", "map_weights", "slices"):
        assert not reporting.kept_table(home / f"{name}.csv", None).empty
