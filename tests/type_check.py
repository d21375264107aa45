"""Runs mypy beside the tests: it takes half a minute of a core, while most tests wait for processes to start."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MYPY = pytest.StashKey[subprocess.Popen[str]]()


def begin(config: pytest.Config) -> None:
    """Starts mypy; `end` waits for it."""
    command = ["nice", "-n", "19", str(Path(sys.executable).parent / "mypy")]
    config.stash[MYPY] = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def end(config: pytest.Config) -> tuple[int, str]:
    """Its exit status and its output."""
    output, _ = config.stash[MYPY].communicate(timeout=280)
    return config.stash[MYPY].returncode, output
