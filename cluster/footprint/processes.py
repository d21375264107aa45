"""The processes that belong to a folder: those that were started with its path in their environment. Linux only.

Whatever a process starts inherits the mark, in any session and group and however late. A pid alone may be another's by
now: what the process was started with is read again through a handle that never passes to a successor.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

MARK = "MOE_CLUSTER_FOLDER"
END_TIMEOUT_S = 10.0
LOOK_INTERVAL_S = 0.02


def members(folder: Path) -> list[int]:
    """Their pids, without this process; a zombie is none any more. Those of another user cannot be read."""
    return [pid for pid in _pids() if pid != os.getpid() and _belongs(pid, folder)]


def end_members(folder: Path, timeout_s: float = END_TIMEOUT_S) -> list[int]:
    """Kills them, and whom they start meanwhile; blocks until there is none. Returns who is left after the timeout: the
    kernel keeps a process that waits for a device."""
    deadline = time.monotonic() + timeout_s
    while left := members(folder):
        if time.monotonic() > deadline:
            return left
        for pid in left:
            _kill(pid, folder)
        time.sleep(LOOK_INTERVAL_S)
    return []


def _kill(pid: int, folder: Path) -> None:
    with suppress(ProcessLookupError):
        handle = os.pidfd_open(pid)
        try:
            if _belongs(pid, folder):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        finally:
            os.close(handle)


def _belongs(pid: int, folder: Path) -> bool:
    with suppress(OSError):
        return f"{MARK}={folder}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return False


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdecimal())
