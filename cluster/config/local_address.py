"""Where `moe-cluster serve` leaves how to reach the Ray that it started, for other commands of the same user."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path


def _file() -> Path:
    return Path(tempfile.gettempdir()) / f"moe-cluster-{os.getuid()}.json"


def leave_address(ray_address: str, environment: Mapping[str, str]) -> Callable[[], None]:
    """Writes it down, readable by this user only; returns what takes it away again.

    environment: what a process needs to be let in, such as a token.
    """
    text = json.dumps({"ray_address": ray_address, "pid": os.getpid(), "environment": dict(environment)})
    with suppress(FileNotFoundError):
        _file().unlink()
    with open(os.open(_file(), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
        out.write(text)

    def remove() -> None:
        with suppress(FileNotFoundError):
            if _file().read_text() == text:
                _file().unlink()

    return remove


def find_address() -> str | None:
    """The address that a process which still runs has left. Sets its environment too: call it before ray loads."""
    try:
        if _file().stat().st_uid != os.getuid():
            return None
        said = json.loads(_file().read_text())
        os.kill(said["pid"], 0)
        os.environ.update(said["environment"])
        return str(said["ray_address"])
    except (OSError, ValueError, KeyError):
        return None
