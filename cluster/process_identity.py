"""Processes of this machine, told apart by when they started, as the kernel gives a pid again. Linux only."""

from pathlib import Path

Identity = tuple[int, str]  # a pid, and when that process started in ticks since boot; "" for one that does not run

_STATE, _PARENT, _START_TICKS = 0, 1, 19  # fields of /proc/<pid>/stat, counted from the one after the command's name


def identity(pid: int) -> Identity:
    """A zombie does not run."""
    fields = _stat(pid)
    return pid, fields[_START_TICKS] if fields and fields[_STATE] not in ("Z", "X") else ""


def is_alive(process: Identity) -> bool:
    return process[1] != "" and identity(process[0]) == process


def parent_of(pid: int) -> int:
    """1, the parent of orphans, for a process that is gone."""
    fields = _stat(pid)
    return int(fields[_PARENT]) if fields else 1


def _stat(pid: int) -> list[str]:
    # The command's name stands in parentheses and may hold spaces and parentheses itself.
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
