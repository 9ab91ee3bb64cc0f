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

from facesr.reporting import write_report

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
    write_report(reported, tmp_path / "report.html")
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
    metrics = json.loads((run / "metrics.json").read_text()) | {"variant": variant, "seed": seed}
    (run / "metrics.json").write_text(json.dumps(metrics))
    table = pd.read_csv(trained / "smoke" / "baseline" / "seed0" / "per_image.csv")
    table["psnr"] += shift
    table.to_csv(run / "per_image.csv", index=False)


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
