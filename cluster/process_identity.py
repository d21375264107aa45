"""Tells this machine's processes apart by their start time, as the kernel reuses pids. Linux only."""

from pathlib import Path

Identity = tuple[int, str]  # a pid, and when that process started in ticks since boot; "" for one that does not run

_STATE, _PARENT, _START_TICKS = 0, 1, 19  # fields of /proc/<pid>/stat, counted from the one after the command's name


def identity(pid: int) -> Identity:
    """The identity of a pid; a zombie counts as a process that does not run."""
    fields = _stat(pid)
    return pid, fields[_START_TICKS] if fields and fields[_STATE] not in ("Z", "X") else ""


def is_alive(process: Identity) -> bool:
    return process[1] != "" and identity(process[0]) == process


def parent_of(pid: int) -> int:
    """The parent's pid; for a process that is gone 1, the parent of orphans."""
    fields = _stat(pid)
    return int(fields[_PARENT]) if fields else 1


def _stat(pid: int) -> list[str]:
    # The command's name stands in parentheses and may contain spaces and parentheses.
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
