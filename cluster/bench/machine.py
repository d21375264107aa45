"""Describes the machine of a measurement, without names that identify it: no host, no user, no path."""

import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from cluster.config.resources import available_cpus, memory_limit

_PACKAGES = ("torch", "ray", "transformers")
_SPEEDS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "sve", "bf16")  # they decide the speed of products


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """num_cores: those that this process may use.  versions: (name, version), Python first."""

    cpu: str
    cpu_features: tuple[str, ...]
    num_cores: int
    memory_bytes: int
    gpus: tuple[str, ...]
    versions: tuple[tuple[str, str], ...]


def this_machine() -> Machine:
    """Describes the machine that it runs on; Linux."""
    cpu, features = parse_cpuinfo(Path("/proc/cpuinfo").read_text(errors="replace"))
    versions = [("Python", platform.python_version())]
    for package in _PACKAGES:
        try:
            versions.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            continue
    return Machine(
        cpu=cpu or platform.machine(),
        cpu_features=features,
        num_cores=available_cpus(),
        memory_bytes=_memory_bytes(),
        gpus=tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())),
        versions=tuple(versions),
    )


def parse_cpuinfo(text: str) -> tuple[str, tuple[str, ...]]:
    """Returns the first processor's model ("" where it has none) and its features among _SPEEDS."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return fields.get("model name", ""), tuple(speed for speed in _SPEEDS if speed in flags)


def process_tree(pid: int) -> set[int]:
    """This process and its descendants. Linux. Raises ProcessLookupError."""
    parents: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            parents[int(status.parent.name)] = int(_status_fields(status)[1])
    if pid not in parents:
        raise ProcessLookupError(f"there is no process {pid}")
    tree = {pid}
    while grown := {child for child, parent in parents.items() if parent in tree} - tree:
        tree |= grown
    return tree


def process_tree_bytes(pid: int) -> tuple[int, int]:
    """The number of processes, this one and its descendants, and their memory together; shared pages count once (Pss).
    Linux. Raises ProcessLookupError."""
    tree = process_tree(pid)
    total = 0
    for member in tree:
        with suppress(OSError):
            for line in Path(f"/proc/{member}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return len(tree), total


def core_seconds(pid: int) -> float:
    """Of a process since its start; 0 for one that has ended. Linux."""
    with suppress(OSError):
        fields = _status_fields(Path(f"/proc/{pid}/stat"))
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _status_fields(status: Path) -> list[str]:
    """Those behind the process's name, which may have spaces: its state first. Raises OSError."""
    return status.read_text().rpartition(")")[2].split()


def _memory_bytes() -> int:
    """The machine's memory, or the limit of this process's control group if that is less."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(physical, memory_limit() or physical)
