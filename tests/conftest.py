import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import pytest

ROOT = Path(__file__).parent.parent
FACESR = str(Path(sys.executable).with_name("facesr"))  # the command of this environment
BUNDLED = ROOT / "facesr" / "assets" / "faces"

_FORKED = multiprocessing.get_context("forkserver")  # of a process that has imported all, and computed nothing yet
_FORKED.set_forkserver_preload(["facesr.training"])


def started(work, *arguments):
    "A process of its own that does this work, without the seconds that imports take."
    process = _FORKED.Process(target=work, args=arguments)
    process.start()
    return process


@pytest.fixture(autouse=True)
def same_environment():
    "Whatever a test, or the library in its process, does to the environment ends with the test."
    with patch.dict(os.environ):
        yield


@pytest.fixture(scope="session")
def scratch():
    "The TMPDIR of processes that are killed, and leave their files. Sockets lie in it, and pytest's paths are long."
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        yield folder


@pytest.fixture
def celeba():
    "The folder of real CelebA; tests that ask for it are skipped where FACESR_CELEBA is not set."
    if not os.environ.get("FACESR_CELEBA"):
        pytest.skip("FACESR_CELEBA is not set")
    return Path(os.environ["FACESR_CELEBA"])


@pytest.fixture
def facesr():
    "Runs the command line in a process of its own, on the bundled faces unless told otherwise."
    environment = {name: value for name, value in os.environ.items() if name != "FACESR_CELEBA"}

    def run(*arguments, **options):
        command = [FACESR, *map(str, arguments)]
        return subprocess.run(
            command,
            cwd=ROOT,
            env=environment | options.pop("env", {}),
            capture_output=True,
            text=True,
            timeout=900,
            **options,
        )

    run.environment = environment
    return run


@pytest.fixture
def command(monkeypatch, capsys):
    "Runs the command line as `facesr` does, without the seconds that a process of its own takes to start."
    from facesr import cli

    monkeypatch.delenv("FACESR_CELEBA", raising=False)

    def run(*arguments):
        words = ["facesr", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as end:
            cli.main()
        return subprocess.CompletedProcess(words, end.value.code or 0, *capsys.readouterr())

    return run


def forked(work, *arguments):
    "Work that may be killed, crash or keep files open: in a process that knows all that this one does."

    def begin():
        import torch

        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        work(*arguments)

    process = multiprocessing.get_context("fork").Process(target=begin)
    process.start()
    return process
