"The report, made from runs as a user makes it: on few runs, on many, with the faces and without."

import base64
import json
import re
import shutil
import subprocess
import sys
from io import BytesIO

import nbformat
import pandas as pd
import pytest
from conftest import BUNDLED, ROOT
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from nbdev.clean import nbdev_clean
from PIL import Image
from test_tables import celeba_of
from traitlets.config import Config as ShellConfig

from facesr import reporting
from facesr.degradation import INTERPOLATIONS
from facesr.runs import find_runs
from facesr.statistics import summarise
from facesr.study import ADDED, PARAMETERS, resolve
from facesr.training import train

VARIANTS = ("baseline", "heatmap")
REPORT, TRAIN = (nbformat.read(ROOT / "nbs" / f"{name}.ipynb", 4) for name in ("report", "train"))
CODE = [cell for cell in REPORT.cells if cell.cell_type == "code"]


@pytest.fixture
def shell(monkeypatch):
    "Runs cells as a kernel does, in this process; gives back the Markdown and HTML that they show."
    monkeypatch.delenv("FACESR_CELEBA", raising=False)
    monkeypatch.chdir(ROOT / "nbs")
    InteractiveShell.clear_instance()
    ipython = InteractiveShell.instance(config=ShellConfig({"HistoryManager": {"enabled": False}}))

    def run(*cells):
        said = []
        for cell in cells:
            with capture_output() as captured:
                result = ipython.run_cell(cell, store_history=True)
            result.raise_error()
            said += [output.data for output in captured.outputs]
        return "\n".join(data.get("text/markdown", data.get("text/html", "")) for data in said)

    yield run
    InteractiveShell.clear_instance()


def run_page(shell, page, parameters):
    "Run a notebook with these parameters; gives back what it says."
    sources = (cell.source for cell in page.cells if cell.cell_type == "code")
    code = [source.replace("%matplotlib inline\n", "") for source in sources]  # magic of a kernel
    given = "\n".join(f"{name} = {str(value)!r}" for name, value in parameters.items())
    first = next(i for i, cell in enumerate(code) if cell.startswith(PARAMETERS))
    return shell(*code[: first + 1], f"{ADDED}\n{given}", *code[first + 1 :])


def make_report(shell, **parameters):
    "Run the report on smoke runs; gives back what it says."
    return run_page(shell, REPORT, {"preset": "smoke"} | parameters)


def content(folder):
    "Every file, by name."
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "The folder of results with a run of two variants."
    results = tmp_path_factory.mktemp("results")
    for variant in VARIANTS:
        train(resolve(variant, "smoke"), BUNDLED, results, report=lambda line: None)
    return results


@pytest.fixture
def reported(facesr, trained):
    "The page of these runs, with the faces, by papermill; made once."
    executed, html = trained / "report.ipynb", trained / "smoke" / "report.html"
    if not html.exists():
        papermill = [sys.executable, "-m", "papermill", "nbs/report.ipynb", str(executed), "--no-progress-bar"]
        parameters = ["--cwd", "nbs", "-p", "preset", "smoke", "-p", "out", str(trained)]
        result = subprocess.run(
            [*papermill, *parameters], cwd=ROOT, env=facesr.environment, capture_output=True, text=True, timeout=900
        )
        assert result.returncode == 0, result.stderr
        reporting.write_report(executed, html, "smoke")
    return html


# The page


def test_the_report_is_a_page(trained, reported):
    page = reported.read_text()
    for word in (
        "<title>smoke: Face super-resolution by eight: what was found</title>",
        "with preset <code>smoke</code></h1>",
        "Does the map help?",
        "facesr train uniform --preset smoke",
        "There is no run of <code>mean</code> and none of <code>shuffled</code>",
        "baseline",
        "heatmap",
        "bicubic",
        "bilinear",
        "LPIPS",
        "PSNR, eyes",
        "Where the attention error looks",
        "Training faces and their heatmaps",
        "What this does not show",
        "The tables and figures of this report are in <code>OUT/smoke</code>.",
    ):
        assert word in re.sub(r'<a class="anchor-link".*?</a>', "", page), word
    order = ['class="verdict"', "data:image/jpeg", "Contents:", "Does the map help?", "<table", "does not show</h2>"]
    places = [re.sub(r'<a class="anchor-link".*?</a>', "", page).index(mark) for mark in order]
    assert places == sorted(places)
    assert page.count("data:image/jpeg") >= 6 and "data:image/png" not in page
    assert page.count("see all →</p><table") == page.count("<table") >= 6
    for unwanted in ("Traceback", "skip_exec", str(ROOT), "<script", "@import", "No description has been", ">True<"):
        assert unwanted not in page
    figures = {path.name for path in (trained / "smoke" / "figures").iterdir()}
    assert figures >= {f"{name}.webp" for name in ("opening", "faces", "curves", "heatmaps", "parts")}


def test_the_page_loads_nothing_and_its_links_lead_somewhere(reported):
    page = reported.read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"|url\((?!data:)', page)
    links, places = set(re.findall(r'href="#([^"]*)"', page)), set(re.findall(r'id="([^"]*)"', page))
    assert len(links) > 10 and links <= places


def test_generated_faces_get_no_verdict_about_maps(reported):
    box = re.search(r'<div class="verdict".*?</div>', reported.read_text(), re.DOTALL)[0]
    assert "About photographs it says nothing." in box and "another seed may differ" in box
    assert re.search(r"<code>heatmap</code> minus <code>baseline</code>: [+-][\d.]+ dB \(95 % interval", box)
    assert not re.search(r"\bthe map (makes|gains|costs|helps)", box, re.IGNORECASE)


def test_faces_are_drawn_once(reported):
    "The ladder from input to target: one face on top, all the others in one gallery."
    captions = re.findall(r'<img[^>]* alt="([^"]*)"', reported.read_text())
    ladders = [said for said in captions if "face" in said and "Nobody chose" in said]
    assert len(ladders) == 2 and "The face on top is left out" in ladders[1]


def test_letters_stay_legible_where_the_page_is_narrow(reported):
    "No picture is shown at less than 0.55 of its size; plots do not even scroll on a telephone."
    page = reported.read_text()
    pictures = re.findall(r'<img style="min-width: (\d+)px"[^>]*alt="([^"]*)"[^>]*base64,([^"]+)"', page)
    assert len(pictures) == page.count("<img")
    for least, said, data in pictures:
        width = Image.open(BytesIO(base64.b64decode(data))).width
        assert int(least) >= 0.55 * width - 1 and (width <= 640 or "aces" in said or "face," in said), said


def test_the_page_fits_a_telephone(reported):
    "Wide tables scroll by themselves, and say so; the page does not."
    api = pytest.importorskip("playwright.sync_api")
    if not (chromium := shutil.which("chromium")):
        pytest.skip("there is no Chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for scheme, least, most in (("light", 250, 255), ("dark", 0, 60)):
            page = browser.new_page(viewport={"width": 400, "height": 800}, color_scheme=scheme)
            page.goto(f"file://{reported}")
            assert page.evaluate("document.documentElement.scrollWidth") == 400
            hints = page.locator(".hint").evaluate_all("all => all.map(hint => hint.offsetHeight > 0)")
            scrolls = page.locator(".wide").evaluate_all("all => all.map(wide => wide.scrollWidth > wide.clientWidth)")
            assert hints == scrolls and 5 < sum(scrolls) < len(scrolls)
            background = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert all(least <= int(value) <= most for value in re.findall(r"\d+", background)[:3])
        browser.close()


def test_the_published_reports_miss_no_number():
    for path in (ROOT / "results").glob("*/report.html"):
        text = re.sub(r'"data:[^"]*"', "", path.read_text())
        assert not re.search(r"\bnan(?:\b|%)", text), path


# The notebook


def test_the_notebook_opens_on_its_title_and_its_code_is_folded(tmp_path, monkeypatch):
    assert REPORT.cells[0].source.startswith("# ") and not any(cell.cell_type == "raw" for cell in REPORT.cells)
    folded = [bool(cell.metadata.get("jupyter", {}).get("source_hidden")) for cell in CODE]
    assert folded == ["parameters" not in cell.metadata.get("tags", []) for cell in CODE]
    copy = shutil.copy(ROOT / "nbs" / "report.ipynb", tmp_path)
    monkeypatch.chdir(ROOT)
    nbdev_clean(fname=str(copy))
    cleaned = [cell for cell in nbformat.read(copy, 4).cells if cell.cell_type == "code"]
    assert [cell.metadata for cell in cleaned] == [cell.metadata for cell in CODE]


@pytest.fixture
def cloned(trained, reported, tmp_path, monkeypatch):
    "A clone with published results of faces that are not on this machine, seen from its notebooks."
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs" / "train.ipynb").touch()
    left_out = shutil.ignore_patterns("*.safetensors", "checkpoint")
    shutil.copytree(trained / "smoke", tmp_path / "results" / "smoke", ignore=left_out)
    for path in (tmp_path / "results" / "smoke").glob("*/seed0/config.json"):
        path.write_text(path.read_text().replace('"origin": "bundled"', '"origin": "CelebA layout"'))
    return tmp_path


def test_the_default_leaves_published_results_alone(cloned, shell, monkeypatch):
    "Without the faces, what they gave is carried over; what was typed before and is gone does not count."
    monkeypatch.chdir(cloned / "nbs")
    before = content(cloned / "results")
    shell('# Parameters of this page\npreset = "quick"\nprest = "smoke"')
    said = make_report(shell)
    mine = content(cloned / "results" / "mine" / "smoke")
    assert "The runs are those of <code>results/smoke</code>" in said and "in `results/mine/smoke`." in said
    assert before.items() <= content(cloned / "results").items()
    kept = ("map_weights.csv", "coverage.csv", "summary.csv", "comparisons.csv", "figures/heatmaps.webp")
    assert {name: mine[name] for name in kept} == {name: before[f"smoke/{name}"] for name in kept}
    assert {name for name in before if "figures" in name} == {f"smoke/{name}" for name in mine if "figures" in name}
    assert "*Training faces and their heatmaps.*" in said
    assert "facesr train uniform --preset smoke --data CELEBA --out results" in said


def test_a_report_that_fails_replaces_nothing(cloned, shell, monkeypatch):
    "All is made before anything is written, also where the report is asked to go to the published results."
    monkeypatch.chdir(cloned / "nbs")
    (cloned / "results" / "smoke" / "map_weights.csv").write_text("map,eyes\nheatmap,many\n")
    before = content(cloned / "results")
    with pytest.raises(ValueError, match="map_weights.csv cannot be used"):
        make_report(shell, out="../results")
    assert content(cloned / "results") == before


def test_a_figure_that_cannot_be_made_again_stays_and_is_named(cloned, shell, monkeypatch):
    monkeypatch.chdir(cloned / "nbs")
    shutil.rmtree(cloned / "results" / "smoke" / "heatmap")
    before = content(cloned / "results" / "smoke" / "figures")
    said = make_report(shell, out="../results")
    assert "give no `comparisons.csv`, `figures/differences.webp`; what is there is of an earlier report." in said
    after = content(cloned / "results" / "smoke" / "figures")
    assert set(after) == set(before) and after["heatmaps.webp"] == before["heatmaps.webp"]
    assert "There is one variant only: nothing to compare." in said
    assert "Does the map help?** Not answered: there are runs of one variant only." in said


def test_other_faces_than_those_of_the_runs_are_refused(shell, trained, tmp_path, monkeypatch):
    (tmp_path / "faces").mkdir()
    for path in sorted(BUNDLED.rglob("*.*"))[:12]:
        shutil.copy(path, tmp_path / "faces")
    monkeypatch.setenv("FACESR_CELEBA", str(tmp_path / "faces"))
    with pytest.raises(ValueError, match="baseline was tested on other faces than those found now"):
        make_report(shell, out=trained)


def test_training_and_report_of_photographs(shell, tmp_path):
    "Both pages, on inputs of another size; of people, so that dlib judges where it is installed."
    (data := tmp_path / "data").mkdir()
    celeba_of(data, 24)
    where = {"preset": "photographs", "data": data, "out": tmp_path}
    small = {"train_faces": 8, "epochs": 1, "batch_size": 8, "width": 16, "blocks": 1, "lpips_weight": 0}
    run_page(shell, TRAIN, where | small | {"variant": "uniform", "mixed_precision": "no"})
    text = make_report(shell, **where)
    assert "There is one variant only" in text
    assert pd.read_csv(tmp_path / "photographs" / "interpolation" / "bicubic.csv")["psnr"].notna().sum() == 8


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


def test_the_report_on_several_seeds_and_controls(shell, many):
    "Runs of other seeds are copies with known shifts, so what the report has to say is known."
    text = make_report(shell, out=many)

    def sentence(variant, reference):
        return next(line for line in text.splitlines() if line.startswith(f"- PSNR, {variant} against {reference}"))

    assert "**Better**" in sentence("heatmap", "baseline")
    assert "heatmap is better in 100% of the pairs of runs" in sentence("heatmap", "baseline")
    assert "**Worse**" in sentence("deep", "baseline")
    assert "**No difference is shown**" in sentence("uniform", "baseline")
    assert "**Better**: p < 0.001;" in sentence("heatmap", "uniform")  # the first question: as if alone
    assert "**Primary: against uniform**" in text and "One seed each" not in text
    assert "In the whole image the map gains PSNR: `heatmap` minus `uniform` is +1.0" in text
    assert "Or only the absolute error?** In the whole image no difference is shown" in text
    assert (many / "smoke" / "figures" / "confound.webp").stat().st_size > 5_000
    table = pd.read_csv(many / "smoke" / "comparisons.csv").set_index(["variant", "reference", "metric"])
    row = table.loc[("heatmap", "baseline", "psnr")]
    assert row["difference"] == pytest.approx(1.045, abs=1e-4)
    half = 2.3646 * 0.0245 / 8**0.5  # Student's t, 7 degrees of freedom; the faces of a seed differ alike
    assert (row["both_low"], row["both_high"]) == pytest.approx((1.045 - half, 1.045 + half), abs=1e-3)
    assert row["p"] < 1e-6


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
        assert not reporting.kept_table(reporting.ReportFiles(home, home), f"{name}.csv", None).empty
