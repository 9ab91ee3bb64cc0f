"Commands in an unfriendly world: whatever is raised ends in a sentence, whatever a path is called arrives as it is."

import ast
import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import typer
from conftest import ROOT
from PIL import Image
from typer.testing import CliRunner

from facesr import cli
from facesr.execution import NotebookError

START = "from facesr import main; main()"


def python(code, *words, **options):
    "Python code in a process of its own."
    command = [sys.executable, "-c", code, *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
    outputs = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run(command, cwd=ROOT, env=environment, text=True, timeout=300, **outputs)


# One way out


class Panic(BaseException):
    "As safetensors raises it, which is written in Rust."


@pytest.mark.parametrize(
    "error, sentence",
    [
        (ValueError("epochs is 0; allowed are 1 and more"), "error: epochs is 0; allowed are 1 and more"),
        (KeyError("parameters"), "error: KeyError: 'parameters' (with FACESR_DEBUG=1"),
        (TypeError("no number"), "error: TypeError: no number (with FACESR_DEBUG=1"),
        (AssertionError(), "error: AssertionError: nothing more is known (with FACESR_DEBUG=1"),
        (EOFError("Ran out of input"), "error: EOFError: Ran out of input"),
        (ImportError("libcudart.so.12 is not there"), "error: ImportError: libcudart.so.12"),
        (RecursionError("maximum depth exceeded"), "error: maximum depth exceeded"),
        (MemoryError(), "error: the memory is not enough (MemoryError)"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "error: the memory is not enough (DefaultCPUAll"),
        (NotebookError("'psnr'", "KeyError"), "error: KeyError: 'psnr'"),
        (NotebookError("", "MemoryError"), "error: the memory is not enough (MemoryError)"),
        (NotebookError("no run was made", "RunComplete"), "error: no run was made"),
        (Panic("index out of bounds"), "error: Panic: index out of bounds"),
    ],
)
def test_whatever_is_raised_ends_in_a_sentence(monkeypatch, capsys, error, sentence):
    app = typer.Typer()

    @app.command()
    def fail():
        raise error

    monkeypatch.setattr(sys, "argv", ["facesr"])
    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr().err
    assert end.value.code == 1
    assert said.splitlines()[-1].startswith(sentence) and "Traceback" not in said
    monkeypatch.setenv("FACESR_DEBUG", "1")
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr().err
    assert "Traceback" in said and "in fail" in said and said.splitlines()[-1].startswith(sentence)


def test_an_interruption_outside_of_a_command_ends_in_a_sentence(monkeypatch, capsys):
    def app():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 130 and capsys.readouterr().err.startswith("interrupted; what is finished stays")


@pytest.mark.parametrize(
    "what, code, sentence",
    [
        ("KeyboardInterrupt", 130, "interrupted, before anything was done"),
        ("ImportError('libcudart.so.12 is not there')", 1, "error: facesr cannot start (ImportError: libcudart.so.12"),
    ],
)
def test_while_a_command_is_imported(what, code, sentence):
    "The first of the large packages is interrupted, or broken."
    broken = (
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(name, *rest):\n"
        f"        if name == 'pandas': raise {what}\n"
        "sys.meta_path.insert(0, Finder)\n"
    )
    result = python(broken + START, "--help")
    assert (result.returncode, result.stdout) == (code, "")
    assert result.stderr.startswith(sentence) and result.stderr.count("\n") == 1


def test_the_command_starts_where_its_imports_are_guarded():
    assert "console_scripts = facesr=facesr:main\n" in (ROOT / "settings.ini").read_text()


def test_threads_that_wait_leave_the_processor_to_others():
    "The command says so before PyTorch starts; the library leaves the environment alone, and a user's word counts."
    spin = "import os, sys; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    cli = f"import sys; cli = type(sys)('cli'); cli.main = lambda: exec({spin!r}); sys.modules['facesr.cli'] = cli"
    asked = f"{cli}; {START}"
    assert python(asked).stdout == "1000 False\n"
    assert python(asked, env={"GOMP_SPINCOUNT": "7"}).stdout == "7 False\n"
    assert python(f"import facesr.model; {spin}").stdout == "None True\n"


def test_what_cannot_be_printed_is_no_success():
    done = "import sys; from facesr import cli, main; cli.app = lambda: (print('done'), sys.exit(0)); main()"
    with open("/dev/full", "w") as full:
        result = python(done, stdout=full, env={"PYTHONUNBUFFERED": ""})
    assert result.returncode == 1
    assert result.stderr == "error: what the command prints cannot be written: No space left on device; make room\n"


# Paths


def parameters():
    "All parameters of all commands: command, name, type and what typer is told of it."
    for group in (cli.app, cli.heatmaps_app):
        for command in group.registered_commands:
            for name, parameter in inspect.signature(command.callback).parameters.items():
                of, *told = get_args(parameter.annotation) or [bool, None]
                yield command.name, name, of, told[0]


def test_a_home_folder_is_found_in_every_path():
    paths = {(command, name): told for command, name, of, told in parameters() if Path in (of, *get_args(of))}
    assert len(paths) > 20
    assert [key for key, told in paths.items() if told.parser is not cli.path] == []
    texts = {(command, name): told for command, name, of, told in parameters() if str in (of, *get_args(of))}
    for key in (("upscale", "weights"), ("export", "weights"), ("make", "detector"), ("import", "source")):
        assert texts[key].parser is cli.home, key


def test_a_home_folder_reaches_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    result = CliRunner().invoke(cli.app, ["evaluate", "~/made", "~/true", "--no-lpips"])
    assert str(result.exception) == f"{tmp_path}/made is not there; it has to be a folder of images"
    assert CliRunner().invoke(cli.app, ["evaluate", "~nobody-of-this-name/made", "~/true"]).exit_code == 2


def test_a_user_without_home_has_one_while_the_command_runs(monkeypatch, capsys):
    "As in a container that runs under a number."

    def unknown(uid):
        raise KeyError(uid)

    lent = []
    monkeypatch.setattr(cli, "app", lambda: lent.append((Path.home(), Path.home().is_dir())))
    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.delenv("HOME")
    cli.main()
    (home, was_there), = lent
    assert was_there and not home.exists() and "HOME" not in os.environ


MAKE_CASES = [
    ("it's here", "o'neil \"and\" sons", ""),
    ("two words", "~/faces", "tcp://10.0.0.1:8786"),
    ("a;b #c", "a&b", "x'y"),
]


@pytest.mark.parametrize("out, data, scheduler", MAKE_CASES)
def test_make_hands_over_what_was_typed(tmp_path, out, data, scheduler):
    for name in ("Makefile", "settings.ini", "setup.py", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("locked", "ready"):
        (tmp_path / ".venv" / name).touch()
    command = tmp_path / ".venv" / "bin" / "facesr"
    command.write_text('#!/bin/sh\nfor word; do echo "$word"; done\n')
    command.chmod(0o755)
    given = [f"OUT={out}", f"DATA={data}", f"SCHEDULER={scheduler}", "SEEDS=3"]
    result = subprocess.run(["make", "--silent", "study", *given], cwd=tmp_path, capture_output=True, text=True)
    words = ["study", "--preset", "quick", "--seed", "0", "--workers", "1", "--out", out, "--seeds", "3"]
    words += ["--scheduler", scheduler] * bool(scheduler) + ["--data", data]
    assert (result.returncode, result.stdout.splitlines(), result.stderr) == (0, words, "")


# Where one stands


@pytest.fixture
def asked(monkeypatch):
    "What `facesr study` and `facesr train` would do, which is not done."
    calls = []

    def note(*arguments):
        calls.append(arguments)
        return arguments[-1]

    monkeypatch.setattr(cli, "run_in_a_row", lambda runs: note(*next(iter(runs.values()))[-2:]) and {})
    monkeypatch.setattr(cli, "run_report", lambda preset, out, notebooks: out)
    monkeypatch.setattr("facesr.training.train", note)
    return calls


@pytest.mark.parametrize("place", [".", "nbs", "results/quick", ".."])
def test_results_and_notebooks_do_not_depend_on_where_one_stands(monkeypatch, asked, place):
    "From the parent folder too, since the package lies in the clone."
    monkeypatch.chdir(ROOT / place)
    for words in (["study"], ["train"]):
        result = CliRunner().invoke(cli.app, words)
        assert result.exit_code == 0, result.exception
    (out, notebooks), (_, _, trained_out) = asked
    assert out == trained_out == ROOT / "results" / "mine" and notebooks == ROOT / "nbs"


@pytest.mark.parametrize("words, code", [(["--preset", "fast"], 2), (["--notebooks", "nowhere"], 1)])
def test_what_is_wrong_for_all_runs_is_said_once(asked, capsys, words, code):
    result = CliRunner().invoke(cli.app, ["study", *words])
    assert result.exit_code == code and not asked
    said = result.stderr + str(result.exception)
    assert said.count("'fast' is none of smoke, quick") + said.count("nowhere/train.ipynb is not there; run this") == 1


@pytest.mark.parametrize("rank, said", [("0", "here\n"), ("1", "")])
def test_of_several_processes_one_speaks(monkeypatch, rank, said):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("facesr.training.train", lambda *arguments: "here")
    assert CliRunner().invoke(cli.app, ["train"]).stdout == said


def test_modules_import_each_other_relatively():
    "nbdev makes an import relative where it stands on one line."
    for path in (ROOT / "facesr").glob("*.py"):
        imports = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)]
        assert not [node.module for node in imports if not node.level and node.module.startswith("facesr")], path.name


# Evaluation


@pytest.fixture
def evaluate(tmp_path):
    "Runs `facesr evaluate` on two grey images and their targets, without a process of its own."
    for folder in ("made", "true"):
        (tmp_path / folder).mkdir()
        for name in ("a", "b"):
            Image.new("RGB", (128, 128), "grey").save(tmp_path / folder / f"{name}.png")

    def run(*words):
        words = ["evaluate", tmp_path / "made", tmp_path / "true", "--no-lpips", *words]
        invoked = CliRunner().invoke(cli.app, list(map(str, words)))
        return str(invoked.exception or ""), invoked.output

    return run


def test_an_odd_output_is_named(evaluate, tmp_path):
    odd = tmp_path / "made" / "b.png"
    odd.unlink()
    odd.symlink_to(odd)
    error, _ = evaluate()
    assert str(odd) in error
    odd.unlink()
    odd.write_bytes(b"no image")
    assert evaluate()[0] == f"{odd}: no image that can be decoded; save it as JPEG, PNG, WebP, BMP, TIFF or HEIC"


def test_a_file_is_not_said_to_be_absent(evaluate, tmp_path):
    shutil.rmtree(tmp_path / "true")
    assert evaluate()[0].endswith("true is not there; it has to be a folder of images")
    (tmp_path / "true").write_text("a zip perhaps")
    assert evaluate()[0].endswith("true is a file; it has to be a folder of images (an archive: unpack it first)")


def test_scores_are_said_before_the_table_fails(evaluate, tmp_path):
    error, said = evaluate("--out", tmp_path / "made" / "a.png" / "table.csv")
    assert "table.csv cannot be written" in error and "2 images; 95 % intervals" in said


def test_a_name_that_is_not_utf_8_is_in_the_table(evaluate, tmp_path):
    for folder in ("made", "true"):
        os.rename(tmp_path / folder / "a.png", os.fsencode(tmp_path / folder) + b"/\xfc.png")
    assert evaluate("--out", tmp_path / "table.csv")[0] in ("", "0")
    assert (tmp_path / "table.csv").read_text().splitlines()[2].startswith("\\udcfc,")


def people(tmp_path, *lines):
    path = tmp_path / "people.txt"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_people_who_are_not_known_are_named_before_anything_is_measured(evaluate, tmp_path, monkeypatch):
    monkeypatch.setattr("facesr.metrics.evaluate_files", lambda *arguments, **options: pytest.fail("it was measured"))
    error, _ = evaluate("--people", people(tmp_path, "a.png 1"))
    assert error.endswith("does not say who is on 1 of 2 images, first b; leave --people out for intervals over images")


def test_people_are_told_apart_by_folders(evaluate, tmp_path):
    for folder in ("made", "true"):
        for person, name in (("A", "a"), ("B", "b")):
            (tmp_path / folder / person).mkdir()
            (tmp_path / folder / f"{name}.png").rename(tmp_path / folder / person / "1.png")
    error, _ = evaluate("--people", people(tmp_path, "1.jpg 7", "2.jpg 8"))
    assert "has one line for A/1 and B/1, that of 1" in error
    _, said = evaluate("--people", people(tmp_path, "A/1.jpg 7", "B/1.jpg 8"))
    assert "2 images of 2 people" in said


def test_outputs_of_other_faces_are_said(evaluate, tmp_path):
    assert "warning" not in evaluate()[1]
    Image.new("RGB", (128, 128), "black").save(tmp_path / "made" / "b.png")
    error, said = evaluate()
    assert "warning: 1 of 2 outputs hardly belong to their targets: brought down to 16x16 again, b has 6.0 dB" in said
