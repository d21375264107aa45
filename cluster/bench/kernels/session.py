"""One run of `moe-cluster bench kernels`, from the shapes to the report. Progress goes to stderr."""

import argparse
import ctypes
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn

from cluster.bench.checkpoint import describe, read_config
from cluster.bench.kernels.attention import attention_cases, left_out
from cluster.bench.kernels.case import TORCH, Call, Case, Measured
from cluster.bench.kernels.experts import expert_cases
from cluster.bench.kernels.masks import mask_cases
from cluster.bench.kernels.products import product_cases
from cluster.bench.kernels.quantized import quantized_cases
from cluster.bench.kernels.reading import Reading
from cluster.bench.kernels.sampling import sampling_cases
from cluster.bench.kernels.table import to_json, to_markdown
from cluster.bench.kernels.timing import least_seconds
from cluster.bench.machine import this_machine
from cluster.bench.sampling import find_samplings
from cluster.checkpoint.made.published import A2_7B_CONFIG
from cluster.checkpoint.model_files import model_directory
from cluster.config import ModelConfig, read_model_config
from cluster.config.environment import MALLOC_ENVIRONMENT
from cluster.config.resources import available_cpus
from cluster.drawing import bars
from cluster.errors import SetupError
from cluster.kernels.native.library import native, variants

_READ = "read"
_MALLOC_OPTIONS = {-1: "MALLOC_TRIM_THRESHOLD_", -3: "MALLOC_MMAP_THRESHOLD_"}  # of mallopt: M_TRIM_…, M_MMAP_THRESHOLD
_MALLOC_DEFAULT = 128 << 10


def measure_kernels(args: argparse.Namespace, clock: Callable[[], float] = time.perf_counter) -> int:
    """Measures, prints a table, returns the exit code. Raises SetupError, CheckpointError."""
    threads = args.threads or tuple(sorted({1, available_cpus()}))
    for option, least in (
        ("--repeat", args.repeat), ("--batch", min(args.batch)), ("--context", min(args.context)),
        ("--threads", min(threads)),
    ):  # fmt: skip
        if least < 1:
            raise SetupError(f"{option} has {least}, numbers from 1 are needed")
    config = read_config(model_directory(args.model_dir)) if args.model_dir else read_model_config(A2_7B_CONFIG)
    dtype = config.dtype if args.dtype == "auto" else args.dtype
    lacks = left_out(config, getattr(torch, dtype), args.batch, args.context) if "attention" in args.kernels else []
    for line in lacks:
        print(line, file=sys.stderr)
    before = torch.get_num_threads()
    try:
        with torch.inference_mode(), _memory_that_stays():
            measured = _measure(args, config, getattr(torch, dtype), threads, clock)
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # torch has no class for it on CPUs
            raise
        batch, context = (",".join(map(str, numbers)) for numbers in (args.batch, args.context))
        raise SetupError(f"too little memory for --batch {batch} and --context {context}: ask for less") from error
    finally:
        torch.set_num_threads(before)
    report = this_machine(), describe(config, dtype), args.repeat, measured, lacks
    print(to_markdown(*report), end="")
    if args.json:
        args.json.write_text(to_json(*report))
    return 0


@contextmanager
def _memory_that_stays() -> Iterator[None]:
    """As in an engine's process (`MALLOC_ENVIRONMENT`): else each call of torch would pay page faults anew."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc
    if set_option is None:
        yield
        return
    for option, name in _MALLOC_OPTIONS.items():
        set_option(option, int(MALLOC_ENVIRONMENT[name]))
    try:
        yield
    finally:
        for option in _MALLOC_OPTIONS:
            set_option(option, _MALLOC_DEFAULT)


def _measure(
    args: argparse.Namespace,
    config: ModelConfig,
    dtype: torch.dtype,
    threads: tuple[int, ...],
    clock: Callable[[], float],
) -> list[Measured]:
    """Sorted by kernel, as the cases come; those of one case by threads."""
    reading = Reading(variants())
    measured: list[Measured] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with bars(*columns) as progress:
        task = progress.add_task(_READ, total=None)
        plain = {}
        for num_threads in threads:
            torch.set_num_threads(num_threads)
            found = _time(reading.case(0, _chosen()), num_threads, args.repeat, None, clock)
            plain[num_threads] = min(found.seconds, key=found.seconds.__getitem__)
            measured.append(found)
        for case in _cases(args, config, dtype):
            for num_threads in threads:
                progress.update(task, description=f"{case.kernel}, {case.size}, {num_threads} threads")
                torch.set_num_threads(num_threads)
                read = reading.case(case.num_bytes, _chosen())
                reader = read.ways[plain[num_threads]], read.num_bytes
                measured.append(_time(case, num_threads, args.repeat, reader, clock))
    return measured


def _cases(args: argparse.Namespace, config: ModelConfig, dtype: torch.dtype) -> Iterator[Case]:
    """Made one after another, so that no case's memory stays beside the next one's."""
    kernels = variants()
    if "products" in args.kernels:
        yield from product_cases(config, dtype, args.batch, kernels)
    if "quantized" in args.kernels:
        yield from quantized_cases(config, dtype, args.batch, kernels)
    if "experts" in args.kernels:
        yield from expert_cases(config, dtype, args.batch, kernels)
    if "attention" in args.kernels:
        yield from attention_cases(config, dtype, args.batch, args.context, kernels)
    if "sampling" in args.kernels:
        samplings = find_samplings(args.sampling, model_directory(args.model_dir) if args.model_dir else Path())
        yield from sampling_cases(config, dtype, args.batch, samplings, kernels)
    if "masks" in args.kernels:
        yield from mask_cases(config.vocab_size, args.batch)


def _time(
    case: Case, num_threads: int, rounds: int, reader: tuple[Call, float] | None, clock: Callable[[], float]
) -> Measured:
    """reader: a plain read and its bytes, to take turns with the case's ways."""
    ways: Mapping[str, Call] = case.ways
    if reader is not None and case.num_bytes:
        ways = {**ways, _READ: reader[0]}
    seconds = least_seconds(ways, rounds, clock)
    took = seconds.pop(_READ, 0.0)
    return Measured(
        kernel=case.kernel,
        size=case.size,
        threads=num_threads,
        unit=case.unit,
        num_bytes=case.num_bytes,
        num_flops=case.num_flops,
        chosen=case.chosen,
        seconds=seconds,
        read_s=took * case.num_bytes / reader[1] if reader is not None else 0.0,
    )


def _chosen() -> str:
    """The variant that this process computes with, else torch."""
    kernels = native()
    return TORCH if kernels is None else kernels.variant
