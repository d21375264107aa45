"""Reads a user's file whole, within a bound: a device may have no end. Knows no content."""

import sys
from pathlib import Path

from cluster.errors import SetupError

SMALL_BYTES = 16 << 20  # certificates, tools, schemas


def read_whole(path: Path, most: int = SMALL_BYTES) -> bytes:
    """most: bytes.  path: "-" is standard input. Raises SetupError for a file that is larger or cannot be read."""
    name = "standard input" if str(path) == "-" else str(path)
    try:
        if str(path) == "-":
            raw = sys.stdin.buffer.read(most + 1)
        else:
            with path.open("rb") as file:
                raw = file.read(most + 1)
    except OSError as error:
        raise SetupError(f"{name} cannot be read: {error.strerror}") from error
    if len(raw) > most:
        raise SetupError(f"{name} has more than {most >> 20} MiB, which is too large here: give a smaller file")
    return raw
