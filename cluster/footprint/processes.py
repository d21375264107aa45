"""The processes that belong to a folder: those that started with its path in their environment. Linux only.

Children inherit this mark, in any session and group and however late they start. A pid may belong to another process by
now: so the environment is read again under a handle, which never passes to another process.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from cluster.process_identity import parent_of

MARK = "MOE_CLUSTER_FOLDER"
END_TIMEOUT_S = 10.0
LOOK_INTERVAL_S = 0.02


def members(folder: Path) -> list[int]:
    """Their pids, without this process and zombies. Another user's processes cannot be read."""
    return [pid for pid in _pids() if pid != os.getpid() and _belongs(pid, folder)]


def end_members(folder: Path, timeout_s: float = END_TIMEOUT_S) -> list[int]:
    """Kills them, and those that they start meanwhile; blocks until there is none. Returns those that are left after
    the timeout: the kernel keeps a process that waits for a device.

    Children come before their parents: HAProxy stands deepest, and if an ingress went first, HAProxy would tell clients
    of a cancel (gRPC's CANCELLED), after which few try again.
    """
    deadline = time.monotonic() + timeout_s
    while left := members(folder):
        if time.monotonic() > deadline:
            return left
        for pid in sorted(left, key=_num_ancestors, reverse=True):
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


def _num_ancestors(pid: int) -> int:
    number = 0
    while pid := parent_of(pid):
        number += 1
    return number


def _belongs(pid: int, folder: Path) -> bool:
    with suppress(OSError):
        return f"{MARK}={folder}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return False


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdecimal())
