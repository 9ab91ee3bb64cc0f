"Every figure in the README is read from results/ by index.ipynb: its code is run again here, on the results as they are and on results that were changed."
import json
import re
import shutil

import nbformat
import pytest
from conftest import ROOT


def said(results):
    "What the cells of index.ipynb that read results say about those in this folder, as they appear in the README."
    cells = [cell for cell in nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4).cells if cell.cell_type == "code"]
    names = {}
    for cell in cells:
        if cell.source.startswith("#| hide"):
            exec(cell.source, names)
    names["RESULTS"] = results
    reading = [cell.source for cell in cells if "hide-input" in cell.metadata.get("tags", [])]
    assert reading
    return [eval(source, names).data.replace("](../", "](") for source in reading]


def differ(results):
    "Whether the README says something else than these results."
    readme = (ROOT / "README.md").read_text()
    return [text for text in said(results) if text not in readme]


def test_the_readme_says_what_the_results_say():
    assert not differ(ROOT / "results")


@pytest.mark.parametrize("path", ["celeba-cpu/baseline/seed0/metrics.json", "celeba-cpu/interpolation/bicubic.json"])
def test_a_changed_result_makes_the_readme_differ(tmp_path, path):
    for file in [*(ROOT / "results").glob("*/**/*.json"), *(ROOT / "results").glob("*/comparisons.csv")]:
        copy = tmp_path / file.relative_to(ROOT / "results")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    assert not differ(tmp_path)
    changed = json.loads((tmp_path / path).read_text())
    changed["test"]["psnr"]["mean"] += 0.01
    (tmp_path / path).write_text(json.dumps(changed))
    assert differ(tmp_path)


def test_numbers_of_quality_stand_nowhere_else_in_the_readme():
    "Whoever types a decibel by hand is found out."
    readme = (ROOT / "README.md").read_text()
    for text in said(ROOT / "results"):
        readme = readme.replace(text, "")
    assert not re.findall(r"\d+(?:\.\d+)?\s*(?:dB|%)", readme)
