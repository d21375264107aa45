"""A folder that becomes a checkpoint all at once: files are written aside, and moved into place when all are whole."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from cluster.errors import ClusterError, SetupError

ASIDE = ".incomplete"
_FULL = (errno.ENOSPC, errno.EDQUOT)


class NewFolder:
    """A folder to write a checkpoint into; use it as a context manager, and call `finish` at the end.

    Files lie in `.incomplete` below it until then: a run that is killed leaves nothing that a reader takes for a model,
    and one that fails removes what it made. All errors are ClusterErrors of one line.
    Raises SetupError for a folder that has anything in it, or that this user may not write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._aside = path / ASIDE
        self._made: list[Path] = []  # folders that were not there, the outermost first
        self._names: list[str] = []

    def __enter__(self) -> Self:
        try:
            self._check_empty()
            missing = [folder for folder in (*reversed(self.path.parents), self.path) if not folder.exists()]
            for folder in missing:
                folder.mkdir()
                self._made.append(folder)
            self._aside.mkdir()
        except OSError as error:
            self._remove()
            raise SetupError(f"{self.path} cannot be written: {error.strerror}: give another folder") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._remove()

    def check_room(self, num_bytes: int) -> None:
        """Raises SetupError where the disk has less room than `num_bytes`."""
        free = shutil.disk_usage(self.path).free
        if free < num_bytes:
            raise SetupError(
                f"{self.path}: {num_bytes:,} bytes are to be written, its disk has {free:,} free: give a folder on a "
                "larger one"
            )

    @contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        """Opens a new file; its bytes are on the disk when the block ends. Raises ClusterError, for a full disk too."""
        with self._in_one_line(name), self._opened(name) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        self._names.append(name)

    def copy(self, source: Path, name: str) -> None:
        """Copies a file. Raises ClusterError."""
        with self.create(name) as file, source.open("rb") as original:
            shutil.copyfileobj(original, file)

    def finish(self) -> None:
        """Moves the files into place in the order in which they were created. Raises ClusterError."""
        with self._in_one_line(""):
            for name in self._names:
                (self.path / name).parent.mkdir(exist_ok=True)
                (self._aside / name).rename(self.path / name)
            shutil.rmtree(self._aside)

    def _opened(self, name: str) -> BinaryIO:
        """name: with a folder before it, if it lies in one."""
        (self._aside / name).parent.mkdir(exist_ok=True)
        return (self._aside / name).open("xb")

    def _check_empty(self) -> None:
        if not os.path.lexists(self.path):
            return
        if not self.path.is_dir():
            raise SetupError(f"{self.path} is not a folder: give a new one, or an empty one")
        found = sorted(path.name for path in self.path.iterdir())
        if ASIDE in found:
            raise SetupError(
                f"{self.path} holds {ASIDE}, of a run that was killed or still goes on: remove the folder, or give "
                "another one"
            )
        if found:
            raise SetupError(f"{self.path} is not empty ({found[0]} is in it): give a new folder, or an empty one")

    @contextmanager
    def _in_one_line(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            advice = ": make room, or give a folder on another disk" if error.errno in _FULL else ""
            raise ClusterError(f"{self.path / name} cannot be written: {error.strerror or error}{advice}") from error

    def _remove(self) -> None:
        """Leaves the folder as it was found."""
        shutil.rmtree(self._aside, ignore_errors=True)
        for name in self._names:  # some may be in place already
            (self.path / name).unlink(missing_ok=True)
        for folder in reversed(self._made):
            with suppress(OSError):
                folder.rmdir()
