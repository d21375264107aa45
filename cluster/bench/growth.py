"""`moe-cluster bench growth`: the time of a decode step against batch, context, shards and layers, one at a time."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

from rich.progress import BarColumn, TextColumn, TimeElapsedColumn

from cluster.bench.checkpoint import describe, made_with_progress, read_config
from cluster.bench.growth_points import GrowthPoint, plan_points
from cluster.bench.machine import this_machine
from cluster.bench.plot import check_plot, plot_growth
from cluster.bench.report import describe_machine, markdown_table
from cluster.bench.spec import SystemSpec
from cluster.bench.systems import check_shards
from cluster.bench.throughput import Prompts, System, Workload
from cluster.bench.worker import RemoteSystem
from cluster.config import ModelConfig
from cluster.drawing import bars
from cluster.errors import SetupError

OUTPUT_TOKENS = 17  # 16 decode steps after the first token

StartSystem = Callable[[SystemSpec, Workload], System]


def measure_growth(args: argparse.Namespace, start: StartSystem | None = None) -> int:
    """Measures, prints a table, draws it where asked to. Raises SetupError."""
    if args.plot:
        check_plot()
    points = plan_points(args)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with bars(*columns) as progress:
        task = progress.add_task("points", total=len(points))
        measured: dict[GrowthPoint, GrowthPoint] = {}
        for layers, shards in dict.fromkeys((point.layers, point.shards) for point in points):
            progress.update(task, description=f"{layers} layers, {shards} shards: loading")
            model_dir = made_with_progress(args.shapes, layers, args.checkpoint_dir, progress)
            config = read_config(model_dir)
            _check_points(points, config)
            together = [point for point in points if (point.layers, point.shards) == (layers, shards)]
            for point, step_ms in _measure_system(model_dir, together, args.repeat, start):
                measured[point] = replace(point, step_ms=step_ms)
                progress.update(task, advance=1, description=f"{point.axis} {point.value}")
    results = [measured[point] for point in points]
    print(f"{describe_machine(this_machine())}\n\nCheckpoint: {describe(config, config.dtype)}.\n")
    print("\n".join(markdown_table(_rows(results))))
    if args.plot:
        plot_growth(results, args.plot)
    if args.json:
        args.json.write_text(json.dumps([asdict(point) for point in results], indent=2) + "\n")
    return 0


def _check_points(points: Sequence[GrowthPoint], config: ModelConfig) -> None:
    """Raises SetupError for a point that the checkpoint does not allow; those of other depths allow the same."""
    for point in points:
        check_shards(point.shards, config)
    num_tokens = max(point.context for point in points) + OUTPUT_TOKENS
    if num_tokens > config.context_length:
        raise SetupError(
            f"--context makes {num_tokens} tokens with the answer's {OUTPUT_TOKENS}, the checkpoint's context is "
            f"{config.context_length}"
        )


def _measure_system(
    model_dir: Path, points: list[GrowthPoint], repeats: int, start: StartSystem | None
) -> list[tuple[GrowthPoint, float]]:
    """Loads one checkpoint on so many shards and times each of its points."""
    config = read_config(model_dir)
    num_shards = points[0].shards
    kind: Literal["local", "stream"] = "stream" if num_shards else "local"
    spec = SystemSpec(kind=kind, model_dir=model_dir, dtype=config.dtype, num_shards=num_shards)
    room = Workload(
        batches=(max(point.batch for point in points),),
        prompt_tokens=max(point.context for point in points),
        output_tokens=OUTPUT_TOKENS,
        repeats=repeats,
        vocab_size=config.vocab_size,
    )
    system = start(spec, room) if start is not None else RemoteSystem(spec, config, room)
    try:
        timed = []
        for point in points:
            workload = replace(room, batches=(point.batch,), prompt_tokens=point.context)
            steps = [_time_step(system, workload.prompts(point.batch, run_id)) for run_id in range(1 + repeats)]
            timed.append((point, 1000 * statistics.median(steps[1:])))
        return timed
    finally:
        system.close()


def _time_step(system: System, prompts: Prompts) -> float:
    """Seconds of a decode step. The prompts' keys and values are in the cache by then: prefill takes seconds, and its
    time wanders by more than a few steps take."""
    system.generate(prompts, 1)
    started = time.perf_counter()
    system.generate(prompts, 1)
    between = time.perf_counter()
    system.generate(prompts, OUTPUT_TOKENS)
    return ((time.perf_counter() - between) - (between - started)) / (OUTPUT_TOKENS - 1)


def _rows(points: list[GrowthPoint]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("varied", "batch", "context", "shards", "layers", "step, ms", "of the axis' first")]
    for point in points:
        first = next(other for other in points if other.axis == point.axis)
        numbers = (point.batch, point.context, point.shards, point.layers)
        rows.append((point.axis, *map(str, numbers), f"{point.step_ms:.1f}", f"{point.step_ms / first.step_ms:.2f}"))
    return rows
