"""The package before its rooms were rebuilt: processes of that version and of this one must understand each other."""

import subprocess
from pathlib import Path

import pytest

COMMIT = "6f4f7f3"
VERSION = "0.0.9"  # it calls itself 0.1.0, as this one does
ROOT = Path(__file__).resolve().parents[1]


def write_last_version(folder: Path) -> None:
    """Writes that version to `folder`/cluster. Skips the test where the history does not reach back to it."""
    folder.mkdir(parents=True)
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", COMMIT, "cluster"], capture_output=True)
    if archive.returncode:
        reason = archive.stderr.decode(errors="replace").strip().splitlines()[-1:]
        pytest.skip(f"this needs the history back to {COMMIT}, as a full clone has it: {reason}")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    (folder / "cluster" / "version.py").write_text(f'__version__ = "{VERSION}"\n')
