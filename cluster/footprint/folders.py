"""A folder for each server and each offline `LLM` on Ray of this user, below one that nobody else may enter.

A lock on a file in it shows that its owner, or the owner's keeper, lives: the kernel releases it when the last of them
ends, and no pid is mistaken for another's. A folder without a locked file is removed, with its processes.
"""

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster.errors import SetupError
from cluster.footprint.processes import end_members

BASE = Path("/tmp")  # not the user's temporary directory: paths of Unix sockets must stay short
LOCK = "lock"


def root() -> Path:
    """This user's folder, made if there is none. Raises SetupError where another user has it."""
    path = BASE / f"moe-{os.getuid()}"
    try:
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
        found = path.lstat()
    except OSError as error:
        raise SetupError(f"{path} cannot be made ({error.strerror}): sockets and logs lie there") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise SetupError(f"{path} belongs to another user: remove it, sockets and logs lie there")
    if found.st_mode & 0o077:
        path.chmod(0o700)
    return path


class OwnedFolder:
    """A new folder, which this process locks until `remove`."""

    def __init__(self) -> None:
        """Raises SetupError."""
        try:
            with _alone():
                self.path = Path(tempfile.mkdtemp(prefix="", dir=root()))
                self.lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
                fcntl.flock(self.lock, fcntl.LOCK_EX)
        except OSError as error:
            raise SetupError(f"no folder can be made in {root()}: {error.strerror}") from error

    def remove(self) -> None:
        """Removes the folder and ends its processes. Safe to call again."""
        remove(self.path)
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1


def remove(folder: Path) -> None:
    """Ends the processes that belong to a folder, then deletes it."""
    end_members(folder)
    shutil.rmtree(folder, ignore_errors=True)


def locked() -> list[Path]:
    """The folders whose owner lives."""
    found = []
    with _alone():
        for folder in _folders():
            lock = _claim(folder)
            if lock is None:
                found.append(folder)
            else:
                os.close(lock)
    return found


def clean() -> None:
    """Removes this user's folders that no process locks any more."""
    with _alone():  # no process makes a folder meanwhile
        claimed = [(folder, lock) for folder in _folders() if (lock := _claim(folder)) is not None]
    for folder, lock in claimed:
        remove(folder)
        os.close(lock)


def _folders() -> list[Path]:
    return [entry for entry in root().iterdir() if entry.is_dir()]


def _claim(folder: Path) -> int | None:
    """Locks a folder; returns the lock, or None where another process has it."""
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    except FileNotFoundError:
        return None  # its owner has just removed it
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


@contextmanager
def _alone() -> Iterator[None]:
    """Keeps other processes of this user from making a folder or looking for abandoned ones meanwhile."""
    lock = os.open(root() / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
