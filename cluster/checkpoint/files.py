"""Reads the small files of a checkpoint's directory, whatever bytes stand there. Knows none of their keys.

A file is absent only where its directory has no such name: a link into nowhere, which half a download leaves, is
refused.
"""

import json
import os
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError

MAX_TEXT_BYTES = 1 << 28  # of a JSON file or a template; released tokenizers take 12 MB
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def check_directory(path: Path, needed: str) -> None:
    """Raises CheckpointError for a path that is no directory, or that this user may not enter."""
    try:
        if path.is_dir():
            return
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    raise CheckpointError(f"{path} is not a directory: give the one that holds the checkpoint's {needed}")


def is_there(path: Path) -> bool:
    return os.path.lexists(path)


def check_file(path: Path) -> int:
    """Returns a file's size in bytes. Raises CheckpointError for no readable file, and for a pointer of Git LFS."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{path} is not a file: put the checkpoint's file in its place")
        with path.open("rb") as file:
            begins = file.read(len(_LFS_POINTER))
    except FileNotFoundError as error:
        also = ", it is a link to a file that is not there: download it again" if path.is_symlink() else ""
        raise CheckpointError(f"{path} is missing{also or ': the directory of a checkpoint must hold it'}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if begins == _LFS_POINTER:
        raise CheckpointError(f"{path} is a pointer of Git LFS, not the file: run `git lfs pull` in its directory")
    return found.st_size


def read_text(path: Path) -> str:
    """A file's text, UTF-8 with or without a byte order mark. Raises CheckpointError."""
    if check_file(path) > MAX_TEXT_BYTES:
        raise CheckpointError(f"{path} has more than {MAX_TEXT_BYTES:,} bytes: no checkpoint has such a large one")
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not UTF-8 ({in_one_line(error)}): download it again") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a file that holds one JSON object. Raises CheckpointError for anything else."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({in_one_line(error)}): download it again") from error
    except RecursionError as error:
        raise CheckpointError(f"{path} is nested too deeply for any checkpoint's JSON: download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, an object is needed")
    return value


def in_one_line(error: object, limit: int = 200) -> str:
    """A foreign error's text for a message of ours."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(str(error).split()))
    return text if len(text) <= limit else f"{text[:limit]} …"


def some(names: Collection[str], singular: str, plural: str, limit: int = 3) -> str:
    """Lists names for a message: "a, b, c and 5 more are"."""
    shown = ", ".join(_printable(name) for name in list(names)[:limit])
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{shown}{more} {singular if len(names) == 1 else plural}"


def _printable(name: str) -> str:
    name = name if len(name) <= 120 else f"{name[:120]}…"
    return name if name.isprintable() else ascii(name)
