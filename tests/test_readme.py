"""Every figure in the README is read from results/ by index.ipynb.

Its code is run again here, on the results as they are and on results that were changed."""

import re
import shutil

import nbformat
import pandas as pd
import pytest
from conftest import ROOT

from facesr.degradation import INTERPOLATIONS
from facesr.reporting import read_summary
from facesr.runs import find_runs, read_table
from facesr.statistics import summarise


def said(results):
    "What the cells of index.ipynb that read results say about those in this folder, as they appear in the README."
    cells = [
        cell for cell in nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4).cells if cell.cell_type == "code"
    ]
    names = {}
    for cell in cells:
        if cell.source.startswith("#| hide"):
            exec(cell.source, names)
    names["RESULTS"] = results
    reading = [cell.source for cell in cells if "hide-input" in cell.metadata.get("tags", [])]
    assert reading
    texts = [eval(source, names).data.replace("](../", "](") for source in reading]
    return [re.sub(r"]\((\w+\.ipynb)\)", r"](nbs/\1)", text) for text in texts]


def differ(results):
    "Whether the README says something else than these results."
    readme = (ROOT / "README.md").read_text()
    return [text for text in said(results) if text not in readme]


def test_the_readme_says_what_the_results_say():
    assert not differ(ROOT / "results")


def change_score(row):
    def change(path):
        found = pd.read_csv(path)
        found.loc[(found["run"] == row) & (found["metric"] == "psnr"), "mean"] += 0.01
        found.to_csv(path, index=False)

    return change


def change_difference(path):
    found = pd.read_csv(path)
    found["difference"] += 0.01
    found.to_csv(path, index=False)


def change_gain(path):
    found = pd.read_csv(path)
    found["drawn_psnr"] += 0.1
    found.to_csv(path, index=False)


@pytest.mark.parametrize(
    "path, change",
    [
        ("celeba/summary.csv", change_score("bicubic")),
        ("celeba/summary.csv", change_score("baseline")),
        ("celeba/comparisons.csv", change_difference),
        ("seeds/comparisons.csv", change_difference),
        ("photographs/faces.csv", change_gain),
    ],
)
def test_a_changed_result_makes_the_readme_differ(tmp_path, path, change):
    results = ROOT / "results"
    tables = [file for name in ("comparisons", "summary", "faces") for file in results.glob(f"*/{name}.csv")]
    for file in [*results.glob("*/**/*.json"), *tables]:
        copy = tmp_path / file.relative_to(ROOT / "results")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    assert not differ(tmp_path)
    change(tmp_path / path)
    assert differ(tmp_path)


@pytest.mark.parametrize("preset", ["celeba", "seeds", "quick"])
def test_the_comparisons_are_those_of_the_runs(preset):
    "A run that was made again and a report that was not would differ here."
    means = {
        (run.variant, run.seed): read_table(run.folder, "per_image.csv").mean(numeric_only=True)
        for run in find_runs(ROOT / "results", preset)
    }
    comparisons = pd.read_csv(ROOT / "results" / preset / "comparisons.csv")
    assert len(comparisons)
    for _, row in comparisons.iterrows():
        seeds = [seed for variant, seed in means if variant == row.variant and (row.reference, seed) in means]
        difference = sum(
            means[row.variant, seed][row.metric] - means[row.reference, seed][row.metric] for seed in seeds
        ) / len(seeds)
        assert difference == pytest.approx(row.difference, abs=1e-5), (row.variant, row.reference, row.metric)


@pytest.mark.parametrize("preset", ["celeba", "seeds", "quick"])
def test_the_summary_is_that_of_the_runs(preset):
    "The mean over the faces and, where there are several, the seeds."
    tables = {}
    for run in find_runs(ROOT / "results", preset):
        tables.setdefault(run.variant, []).append(read_table(run.folder, "per_image.csv"))
    summary = read_summary(ROOT / "results" / preset / "summary.csv")
    floors = {m: read_table(ROOT / "results" / preset / "interpolation", f"{m}.csv") for m in INTERPOLATIONS}
    assert set(summary) == {*tables, *INTERPOLATIONS}
    for row, seeds in (tables | {method: [table] for method, table in floors.items()}).items():
        assert "psnr" in summary[row]
        for metric, score in summary[row].items():
            mean = sum(table[metric].mean() for table in seeds) / len(seeds)
            assert score["mean"] == pytest.approx(mean, rel=1e-5) and score["n"] == seeds[0][metric].notna().sum()
        averaged = seeds[0][["name", "person"]].assign(psnr=sum(table["psnr"] for table in seeds) / len(seeds))
        for end, value in summarise(averaged)["psnr"].items():
            assert end not in ("low", "high") or summary[row]["psnr"][end] == pytest.approx(value, rel=1e-5)


def test_numbers_of_quality_stand_nowhere_else_in_the_readme():
    "Whoever types a decibel by hand is found out."
    readme = (ROOT / "README.md").read_text()
    for text in said(ROOT / "results"):
        readme = readme.replace(text, "")
    assert not re.findall(r"\d+(?:\.\d+)?\s*(?:dB|%)", readme)
