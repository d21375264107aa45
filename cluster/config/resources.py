"""Finds the CPUs and the memory that this process may use: the machine's, or less if a control group limits it.

Reads /proc and the control groups (version 1 and 2) that they name. Each group above this process's may have a limit
too, and all of them count. A limit that cannot be read is none.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")


def all_cpus() -> int:
    """CPUs of the machine, whoever may use them."""
    return os.cpu_count() or 1


def available_cpus(root: Path = ROOT) -> int:
    """Returns the CPUs that this process may run on, a control group's quota rounded up; at least one.

    root: the folder of /proc and the control groups.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [_v2_quota(group) if version == 2 else _v1_quota(group) for version, group in _groups("cpu", root)]
    return max(1, min([cpus, *(-(-quota // period) for quota, period in filter(None, quotas))]))


def available_memory(root: Path = ROOT) -> int | None:
    """Returns the bytes that this process and others in its control groups can still take without swapping; None if
    unknown."""
    rooms = [_memory_information("MemAvailable", root)]
    for version, group in _groups("memory", root):
        v2 = version == 2
        limit = _number(group / ("memory.max" if v2 else "memory.limit_in_bytes"))
        used = _number(group / ("memory.current" if v2 else "memory.usage_in_bytes"))
        if limit is not None and used is not None:
            # The kernel gives up files that were read and are not in use before it refuses anything.
            cached = _entry(group / "memory.stat", "inactive_file" if v2 else "total_inactive_file") or 0
            rooms.append(max(0, limit - used + min(cached, used)))
    known = [room for room in rooms if room is not None]
    return min(known, default=None)


def memory_limit(root: Path = ROOT) -> int | None:
    """Returns the bytes that the control groups allow, or the machine has; None if unknown."""
    limits = [_memory_information("MemTotal", root)]
    for version, group in _groups("memory", root):
        limits.append(_number(group / ("memory.max" if version == 2 else "memory.limit_in_bytes")))
    return min((limit for limit in limits if limit is not None), default=None)


@dataclass(frozen=True, slots=True)
class _Mount:
    """A mounted tree of control groups. top: the group that is seen at `point`.  controllers: of version 1."""

    version: int
    top: str
    point: Path
    controllers: frozenset[str]


def _groups(controller: str, root: Path) -> Iterator[tuple[int, Path]]:
    """Yields version and folder of this process's group and of all above it, in each tree that knows the controller."""
    groups = _groups_of_process(root)
    for mount in _mounts(root):
        name = "" if mount.version == 2 else controller
        if name not in groups or (name and name not in mount.controllers):
            continue
        inside = os.path.relpath(groups[name], mount.top)
        # A container may see its group as the top, but read the group's name as it is outside.
        group = mount.point if inside.startswith("..") else mount.point / inside
        yield mount.version, group
        while group != mount.point:
            group = group.parent
            yield mount.version, group


def _groups_of_process(root: Path) -> dict[str, str]:
    """Returns the group's name for each controller of version 1, and for "" that of version 2."""
    groups: dict[str, str] = {}
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if number == "0" and not controllers:
            groups[""] = name
        else:
            groups |= dict.fromkeys(controllers.split(","), name)
    return groups


def _mounts(root: Path) -> Iterator[_Mount]:
    for line in _lines(root / "proc/self/mountinfo"):
        mounted, _, kind = line.partition(" - ")
        fields, described = mounted.split(), kind.split()
        if len(fields) >= 5 and len(described) >= 3 and described[0] in ("cgroup", "cgroup2"):
            version = 2 if described[0] == "cgroup2" else 1
            point = root / fields[4].lstrip("/")
            yield _Mount(version, fields[3], point, frozenset(described[2].split(",")))


def _v2_quota(group: Path) -> tuple[int, int] | None:
    """Returns the microseconds of CPU in a period, and the period."""
    for line in _lines(group / "cpu.max"):
        quota, _, period = line.partition(" ")
        if quota.isdecimal() and period.isdecimal() and int(period):
            return int(quota), int(period)
    return None


def _v1_quota(group: Path) -> tuple[int, int] | None:
    quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
    return (quota, period) if quota is not None and period else None


def _number(file: Path) -> int | None:
    """Returns the number in a file; None for "max", -1 and no such file."""
    for line in _lines(file):
        return int(line) if line.isdecimal() else None
    return None


def _entry(file: Path, key: str) -> int | None:
    for line in _lines(file):
        name, _, value = line.partition(" ")
        if name == key and value.isdecimal():
            return int(value)
    return None


def _memory_information(name: str, root: Path) -> int | None:
    for line in _lines(root / "proc/meminfo"):
        key, _, value = line.partition(":")
        if key == name and value.split() and value.split()[0].isdecimal():
            return int(value.split()[0]) * 1024
    return None


def _lines(file: Path) -> list[str]:
    try:
        return [line.strip() for line in file.read_text(errors="replace").splitlines()]
    except OSError:
        return []
