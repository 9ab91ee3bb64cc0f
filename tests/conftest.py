import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

ROOT = Path(__file__).parent.parent
FACESR = str(Path(sys.executable).with_name("facesr"))  # the command of this environment
BUNDLED = ROOT / "facesr" / "assets" / "faces"


@pytest.fixture(autouse=True)
def same_environment():
    "Whatever a test, or the library in its process, does to the environment ends with the test."
    with patch.dict(os.environ):
        yield


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
