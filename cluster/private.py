"""Folders that no other user of the machine can read. Does not know their contents."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

from cluster.errors import SetupError


def private_folder(path: Path) -> Path:
    """Makes the folder, or takes one of this user, and closes it to others; returns its path without links.

    Raises SetupError for a folder that another user owns or could replace: below /tmp anybody may have made it.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = path.resolve()
    for folder in (path, *takewhile(lambda parent: not _is_open(parent), path.parents)):
        if folder.stat().st_uid not in (os.geteuid(), 0):
            raise SetupError(f"{folder} belongs to another user, who could read what is written there: remove it")
    above = next((parent for parent in path.parents if _is_open(parent)), None)
    if above is not None and not above.stat().st_mode & stat.S_ISVTX:
        raise SetupError(f"{path} could be replaced by anybody, {above} is open to all: chmod o-w {above}")
    path.chmod(0o700)
    return path


def _is_open(folder: Path) -> bool:
    return bool(folder.stat().st_mode & stat.S_IWOTH)


@contextmanager
def private_files() -> Iterator[None]:
    """Files that this process, or one that it starts, makes meanwhile are for this user alone."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)
