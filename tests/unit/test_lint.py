"""The static checks, one test each; a failure shows the tool's own output."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def check(*command):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"


def test_ruff_finds_nothing():
    check(BIN / "ruff", "check", ".")


def test_the_format_is_ruffs():
    check(BIN / "ruff", "format", "--check", ".")


@pytest.mark.slow  # every file of the package anew
def test_types_are_right_under_mypy_strict():
    check(BIN / "mypy")


def test_imports_run_downhill():
    check(BIN / "lint-imports")


def test_the_protos_are_clean_under_buf_lint():
    buf = os.environ.get("BUF") or shutil.which("buf")
    if buf is None:
        pytest.skip("buf is not installed")
    check(buf, "lint", "protos")
