"""Execute notebooks, save their outputs, and record what was executed.

    python nbs/execute.py                  # all whose record in executed.json is not that of the files
    python nbs/execute.py 06_model report  # these (also: make notebooks NB="06_model report")

A record is written when a notebook has run to its end, and in no other way; tests/test_house.py compares it with the
files, so that no saved output is older than the code that made it. It holds SHA-256 digests:

- `code`: of the notebook's code cells, as syntax trees without imports and docstrings. Comments, line breaks and the
  way in which a string is cut into literals do not count.
- `library`: of the modules of facesr that the notebook imports, also through other modules, or inside functions.
- `asset`, in place of `library`: of the files that a make_ notebook has made and that the package ships. Such a
  notebook is the account of how its asset came about: it is run only when it is named, not when the library changes.
- `results`, in place of `library`: of the tables of a search or measurement, which its notebook reads instead of making
  them again.

Results that report.ipynb and index.ipynb read are not part of a record: tests/test_readme.py looks after those.
"""

import ast
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

if TYPE_CHECKING:
    from nbformat import NotebookNode

NOTEBOOKS = Path(__file__).resolve().parent
ROOT = NOTEBOOKS.parent
PACKAGE = ROOT / "facesr"
RECORD = NOTEBOOKS / "executed.json"
MADE = {
    "make_faces": ("asset", PACKAGE / "assets" / "faces", ("img_align_celeba/*", "*.csv")),
    "make_detector": ("asset", PACKAGE / "assets" / "detector", ("parts.safetensors",)),
    "make_weights": ("asset", PACKAGE / "assets" / "weights", ("*.safetensors", "doubt.csv")),
    "search": ("results", ROOT / "results", ("search*.csv", "search/*")),
    "photograph_benchmark": ("results", ROOT / "results", ("photographs/*.csv",)),
    "cells": ("results", ROOT / "results", ("cells/*.csv", "cells/own/*.csv")),
}
WIDGET = "application/vnd.jupyter.widget-view+json"
NEW_FOLDER = object()  # a temporary one
PARAMETERS = {
    "train": {"variant": "heatmap", "preset": "quick", "out": NEW_FOLDER},
    "report": {"preset": "celeba", "out": "../results"},  # the repository's own
}
ON_CELEBA = ("benchmark", "make_detector", "make_faces", "make_weights", "report", "search")  # others: bundled faces


class _Essence(ast.NodeTransformer):
    "A syntax tree without what does not change its outputs."

    def visit_Import(self, node):
        return None

    visit_ImportFrom = visit_Import

    def visit_FunctionDef(self, node):
        self.generic_visit(node)
        if ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
        return node

    visit_AsyncFunctionDef = visit_ClassDef = visit_FunctionDef

    def visit_JoinedStr(self, node):
        self.generic_visit(node)
        parts = []
        for part in node.values:
            if parts and isinstance(part, ast.Constant) and isinstance(parts[-1], ast.Constant):
                parts[-1] = ast.Constant(parts[-1].value + part.value)
            else:
                parts.append(part)
        return parts[0] if len(parts) == 1 and isinstance(parts[0], ast.Constant) else ast.JoinedStr(parts)


def _plain(node):
    "A syntax tree as JSON, the same under every version of Python."
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = {name: value for name, value in ast.iter_fields(node) if value not in (None, []) and name != "kind"}
    return [type(node).__name__, {name: _plain(value) for name, value in fields.items()}]


def _digest(*trees):
    content = [_plain(_Essence().visit(tree)) for tree in trees]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def cells(
    name: str,  # of a notebook, without .ipynb
) -> list[dict]:
    "The code cells of a notebook."
    notebook = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def parse(
    source: str | list[str],  # of a code cell
) -> ast.Module:
    "The syntax tree of a cell; IPython's magics are turned into the calls that they stand for."
    from IPython.core.inputtransformer2 import TransformerManager

    return ast.parse(TransformerManager().transform_cell("".join(source)))


def imported(
    tree: ast.AST,
) -> set[str]:  # names under facesr; "" where it is facesr itself
    "Modules of the library that some code imports, at its head or inside functions."
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, ["facesr" if node.level else "", node.module]))
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "facesr" else [module]
        else:
            continue
        parts = [name.split(".") for name in names if name.split(".")[0] == "facesr"]
        found |= {part[1] if len(part) > 1 and (PACKAGE / f"{part[1]}.py").exists() else "" for part in parts}
    return found


def library(
    names: set[str],  # modules that are imported
) -> set[str]:        # those, and what they import
    "All modules of the library that are imported with some."
    found, todo = set(), set(names)
    while todo:
        module = todo.pop()
        found.add(module)
        tree = ast.parse((PACKAGE / f"{module or '__init__'}.py").read_text(encoding="utf-8"))
        todo |= imported(tree) - found
    return found - {""}  # facesr itself holds a version, which changes no output


def _module(name):
    "The syntax tree of a module without its docstring."
    tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    tree.body = tree.body[ast.get_docstring(tree) is not None :]
    return tree


def _files(folder, patterns):
    "A digest of the names and contents of files."
    digest = hashlib.sha256()
    files = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    if not files:
        raise FileNotFoundError(f"{folder} has none of {', '.join(patterns)}")
    for path in files:
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def current(
    name: str,  # of a notebook, without .ipynb
) -> dict[str, str]:
    "What the record of a notebook says if it is executed now."
    trees = [parse(cell["source"]) for cell in cells(name)]
    modules = library(set().union(*map(imported, trees)))
    record = {"code": _digest(*trees)}
    if name in MADE:
        kind, folder, patterns = MADE[name]
        return record | {kind: _files(folder, patterns)}
    return record | {"library": _digest(*map(_module, sorted(modules)))}


def recorded() -> dict[str, dict[str, str]]:
    "All records."
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}


def all_notebooks() -> list[str]:
    return sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))


def _run(notebook: "NotebookNode", given: dict[str, object]) -> None:
    """Run a notebook from top to bottom, in place.

    papermill would wait for ever at the slider of upscale.ipynb, and leave a second cell of parameters."""
    from nbclient import NotebookClient
    from traitlets.config import Config

    asked = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    sources = [cell.source for cell in asked]
    for cell in asked:  # for this time only
        cell.source += "".join(f"\n{key} = {value!r}" for key, value in given.items())
    with tempfile.TemporaryDirectory() as sockets:
        private = Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets}/kernel"}})
        client = NotebookClient(notebook, timeout=None, kernel_name="python3", record_timing=False, config=private)
        client.resources = {"metadata": {"path": str(NOTEBOOKS)}}
        client.coalesce_streams = True
        client.execute()
    for cell, source in zip(asked, sources):
        cell.source = source


def execute(name: str) -> None:
    "Run a notebook from top to bottom, save it with its outputs, and record that."
    import nbformat

    from facesr.runs import as_published, write_atomically, write_json

    path, before = NOTEBOOKS / f"{name}.ipynb", current(name)
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ):
        if name not in ON_CELEBA:
            os.environ.pop("FACESR_CELEBA", None)
        given = {key: folder if value is NEW_FOLDER else value for key, value in PARAMETERS.get(name, {}).items()}
        _run(notebook, given)
        notebook.metadata.pop("widgets", None)  # they live where the notebook runs; on a saved page they would be dead
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
        cleaned = Path(folder) / path.name
        cleaned.write_text(as_published(notebook).replace(folder, "results/mine"), encoding="utf-8")
        command = [Path(sys.executable).with_name("nbdev_clean"), "--fname", cleaned]
        subprocess.run(command, cwd=ROOT, check=True)
        write_atomically(path, cleaned.read_text(encoding="utf-8"))
    after = current(name) if name in MADE else before  # what it has made counts as it is now
    write_json(RECORD, dict(sorted((recorded() | {name: after | {"code": before["code"]}}).items())))


def main(asked: list[str]) -> None:
    "Execute notebooks by name, or all whose record is not that of the files."
    from nbclient.exceptions import CellControlSignal, DeadKernelError

    known, names = all_notebooks(), [Path(name).stem for name in asked]
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"there is no notebook {unknown[0]!r}; allowed are {', '.join(known)}")
    if not asked:
        stale = [name for name in known if recorded().get(name) != current(name)]
        names = [name for name in stale if not name.startswith("make_")]
        for name in sorted(set(stale) - set(names)):
            print(f"{name}: its record is old; it makes a shipped asset anew: make notebooks NB={name}")
    failed = []
    for name in names:
        print(f"{name}: executing", flush=True)
        try:
            execute(name)
        except (CellControlSignal, DeadKernelError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed.append(name)
    if failed:
        sys.exit(f"as they were, because a cell failed: {', '.join(failed)}")


if __name__ == "__main__":
    main(sys.argv[1:])
