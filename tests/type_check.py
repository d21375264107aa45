"""mypy, beside the tests: it takes half a minute of a core, while most of the others wait for processes to start."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MYPY = pytest.StashKey[subprocess.Popen[str]]()


def begin(config: pytest.Config) -> None:
    """Starts it; `end` waits for it."""
    command = ["nice", "-n", "19", str(Path(sys.executable).parent / "mypy")]
    config.stash[MYPY] = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def end(config: pytest.Config) -> tuple[int, str]:
    """Its exit status and what it said."""
    said, _ = config.stash[MYPY].communicate(timeout=280)
    return config.stash[MYPY].returncode, said
