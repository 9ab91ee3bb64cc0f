"The order of the house: saved outputs are those of the code, cells are short and proved, imports point one way."

import ast
import importlib.util
import json
import re
import shlex
import subprocess
from configparser import ConfigParser
from statistics import median

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

spec = importlib.util.spec_from_file_location("execute", ROOT / "nbs" / "execute.py")
house = importlib.util.module_from_spec(spec)
spec.loader.exec_module(house)
NUMBERED = [name for name in house.all_notebooks() if re.match(r"\d\d_", name)]
LONGEST, MEDIAN = 60, 14  # lines of an exported cell
TREE, RESULTS = 50e6, 12e6  # bytes
EXPORT = re.compile(r"^#\|\s*exports?\b", re.M)


# Saved outputs


@pytest.mark.parametrize("name", house.all_notebooks())
def test_saved_outputs_are_those_of_the_code(name):
    found, now = house.recorded().get(name, {}), house.current(name)
    changed = [part for part in now if found.get(part) != now[part]]
    again = f"make notebooks NB={name} runs it again (make notebooks: all that are old)"
    assert not changed, f"nbs/{name}.ipynb was executed before its {' and '.join(changed)} changed; {again}"


def test_no_record_is_left_of_a_notebook_that_is_gone():
    assert set(house.recorded()) <= set(house.all_notebooks())


def digest(source):
    return house._digest(house.parse(source))


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("a = 1", "a = (1)  # one", True),
        ("import os\na = 1", "a = 1\nfrom sys import path", True),
        ('def f():\n    "Says."\n    return 1', 'def f():\n    "Says more."\n    return 1', True),
        ("a = f'one {b} two'", "a = (\n    'one '\n    f'{b}'\n    ' two'\n)", True),
        ("a = f'one' 'two'", "a = 'onetwo'", True),
        ("%matplotlib inline", "# with care\n%matplotlib inline", True),
        ("%matplotlib inline", "%matplotlib widget", False),
        ("a = 1", "a = True", False),
        ("a = None", "a = ''", False),
        ("a = f'one {b} two'", "a = f'one {b} three'", False),
        ("a = f'{b:.2f}'", "a = f'{b:.3f}'", False),
        ("'shown'", "'seen'", False),
    ],
)
def test_a_record_knows_code_from_form(one, other, same):
    assert (digest(one) == digest(other)) == same


def test_a_record_holds_what_is_imported_through_others_and_inside_functions():
    tree = house.parse("def f():\n    from facesr.losses import Objective")
    assert house.imported(tree) == {"losses"}
    assert {"losses", "degradation", "perceptual"} <= house.library({"losses"})
    assert "losses" not in house.library({"degradation"})
    assert "upscale" in house.library(house.imported(house.parse("from facesr import Upscaler")))


def test_a_changed_file_makes_another_record(tmp_path):
    (tmp_path / "a.csv").write_text("1")
    first = house._files(tmp_path, ["*.csv"])
    (tmp_path / "a.csv").write_text("2")
    assert house._files(tmp_path, ["*.csv"]) != first
    with pytest.raises(FileNotFoundError, match="has none of"):
        house._files(tmp_path, ["*.json"])


# Cells


def source(cell):
    return "".join(cell["source"])


def imports(statement):
    "Whether a statement imports, or imports under a condition (TYPE_CHECKING)."
    return isinstance(statement, (ast.Import, ast.ImportFrom)) or (
        isinstance(statement, ast.If) and all(map(imports, statement.body + statement.orelse))
    )


def only_imports(cell):
    return all(map(imports, house.parse(source(cell)).body))


def exported(name):
    "Positions and cells of a notebook that are exported and more than imports."
    return [
        (i, cell)
        for i, cell in enumerate(house.cells(name))
        if EXPORT.search(source(cell)) and not only_imports(cell)
    ]


def lines(cell):
    return len(EXPORT.sub("", source(cell)).strip().splitlines())


def first_line(cell):
    return EXPORT.sub("", source(cell)).strip().splitlines()[0]


def proves(cell):
    "Whether a cell asserts or shows something."
    body = house.parse(source(cell)).body
    called = [node.func for tree in body for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = [getattr(function, "id", getattr(function, "attr", "")) for function in called]
    return (
        any(isinstance(node, ast.Assert) for tree in body for node in ast.walk(tree))
        or any(name.startswith("test_") or name in ("display", "show", "figure", "subplots") for name in names)
        or bool(body and isinstance(body[-1], ast.Expr))
    )


@pytest.mark.parametrize("name", NUMBERED)
def test_no_exported_cell_is_long(name):
    long = [f"{lines(cell)} lines: {first_line(cell)}" for _, cell in exported(name) if lines(cell) > LONGEST]
    assert not long, f"nbs/{name}.ipynb has cells of more than {LONGEST} lines: {long}"


def test_exported_cells_are_short_as_a_rule():
    lengths = [lines(cell) for name in NUMBERED for _, cell in exported(name)]
    assert median(lengths) <= MEDIAN, f"the median of {len(lengths)} exported cells is {median(lengths)} lines"


@pytest.mark.parametrize("name", NUMBERED)
def test_what_is_exported_is_proved_or_shown_at_once(name):
    code = house.cells(name)
    bare = [
        first_line(cell)
        for i, cell in exported(name)
        if not any(not EXPORT.search(source(after)) and proves(after) for after in code[i + 1 : i + 3])
    ]
    assert not bare, f"nbs/{name}.ipynb has no assertion or picture within two cells after {bare}"


@pytest.mark.parametrize("name", NUMBERED)
def test_imports_point_to_smaller_numbers(name):
    number = {other[3:]: other[:2] for other in NUMBERED}
    used = set().union(*(house.imported(house.parse(source(cell))) for cell in house.cells(name))) - {""}
    wrong = sorted(module for module in used if number.get(module, "99") >= name[:2])
    assert not wrong, f"nbs/{name}.ipynb imports from {wrong}; allowed are modules with a smaller number"


# Files


def kept():
    "The files of the repository."
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


@pytest.mark.parametrize("folder, limit", [(ROOT, TREE), (ROOT / "results", RESULTS)], ids=["all", "results"])
def test_a_clone_is_small(folder, limit):
    files = {path: path.stat().st_size for path in kept() if path.is_relative_to(folder)}
    largest = [f"{path.relative_to(ROOT)} ({files[path] / 1e6:.1f} MB)" for path in sorted(files, key=files.get)[-5:]]
    total = sum(files.values())
    assert 0 < total <= limit, f"{total / 1e6:.1f} MB are kept, allowed are {limit / 1e6:.0f}; largest: {largest}"


def test_no_weights_are_kept_under_results():
    assert not [path for path in kept() if path.suffix == ".safetensors" and path.is_relative_to(ROOT / "results")]


def pictures(notebook):
    "The kinds of all saved pictures of a notebook, those inside HTML and attachments among them."
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    bundles = [output.get("data", {}) for output in outputs]
    bundles += [bundle for cell in notebook["cells"] for bundle in cell.get("attachments", {}).values()]
    prose = [source(cell) for cell in notebook["cells"] if cell["cell_type"] != "code"]
    within = re.findall(r"data:(image/[\w+.-]+)", json.dumps([outputs, prose]))
    return {kind for bundle in bundles for kind in bundle if kind.startswith("image/")} | set(within)


@pytest.mark.parametrize("path", [p for p in kept() if p.suffix == ".ipynb"], ids=lambda p: str(p.relative_to(ROOT)))
def test_saved_pictures_are_small_ones(path):
    found = pictures(json.loads(path.read_text(encoding="utf-8"))) - {"image/jpeg", "image/webp"}
    assert not found, f"{path.relative_to(ROOT)} has pictures as {found}; make notebooks saves JPEG"


# The lock


def wanted():
    "What settings.ini asks for, with all extras."
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    texts = [text for key, text in config["DEFAULT"].items() if key.endswith("requirements")]
    return [Requirement(item) for text in texts for item in shlex.split(text)]


def locked():
    "Pins of the lock."
    listed = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in listed if not line.startswith("#")]


def test_the_lock_holds_one_version_of_everything_and_no_address():
    for pin in locked():
        assert re.fullmatch(r"==[\w.]+", str(pin.specifier)) and not pin.url, f"{pin} is no version; make lock"


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_the_lock_is_that_of_the_settings(python):
    here = {"python_version": python, "python_full_version": f"{python}.5", "sys_platform": "linux"}
    here |= {"platform_machine": "x86_64", "platform_system": "Linux", "os_name": "posix"}
    pins = [pin for pin in locked() if not pin.marker or pin.marker.evaluate(here)]
    assert len({pin.name for pin in pins}) == len(pins)
    versions = {pin.name: str(pin.specifier)[2:] for pin in pins}
    for asked in wanted():
        found = versions.get(asked.name)
        assert found and found in asked.specifier, f"{asked} is wanted, {found} is locked; make lock"


@pytest.mark.parametrize("path", sorted((ROOT / "facesr").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_lines_of_modules_are_short(path):
    "ruff looks at the notebooks; what nbdev makes of them is looked at here, but for its line of names."
    long = [line for line in path.read_text(encoding="utf-8").splitlines() if len(line) > 120]
    assert [line for line in long if not re.match(r"__all__ = |           '", line)] == []
