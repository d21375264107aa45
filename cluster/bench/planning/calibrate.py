"""`moe-cluster bench calibrate`: measures what the planner has to know of one model on this machine, into a file."""

import argparse
import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

from cluster.bench.checkpoint import made_with_progress, read_config
from cluster.bench.limits import check_output
from cluster.bench.machine import this_machine
from cluster.bench.planning.fit import fit_attention, fit_experts, least_squares
from cluster.bench.planning.predict import predict
from cluster.bench.planning.served import CALLS, Bench, Measured, Setting, serve_here
from cluster.bench.planning.steps import StepPoint, cache_bytes, time_steps
from cluster.bench.report import describe_machine
from cluster.checkpoint.model_files import complete_directory
from cluster.checkpoint.sizes import sizes_of
from cluster.config import ModelConfig
from cluster.drawing import bars
from cluster.errors import ClusterError
from cluster.planning.calibration import Calibration, describe_shapes, write_calibration
from cluster.planning.costs import FrontCosts, StepTime, StepWork
from cluster.planning.curve import Curve
from cluster.planning.simulation import Record

# One replica and one shard: a lone stream, more of them, short answers, and long prompts. Of the last three each makes
# one part of the costs large. Each runs for 5 to 8 s: with a third of that, two calibrations of one machine were 20 %
# apart.
_STREAM = Setting(replicas=1, shards=1, prompt_tokens=48, output_tokens=24, num_requests=6, concurrency=1)
WARM_UP = replace(_STREAM, num_requests=2, seed=1)
SERVED = (
    replace(_STREAM, num_requests=18, seed=2),
    replace(_STREAM, concurrency=6, num_requests=72, seed=3),
    replace(_STREAM, concurrency=24, num_requests=168, seed=4),
    replace(_STREAM, concurrency=6, num_requests=144, output_tokens=4, seed=5),
    replace(_STREAM, concurrency=4, num_requests=48, prompt_tokens=640, output_tokens=8, seed=6),
)


def measure_calibration(args: argparse.Namespace) -> int:
    """Raises SetupError, ClusterError."""
    check_output("--output", args.output)
    with bars() as progress:
        model_dir = checkpoint_of(args, progress)
        task = progress.add_task("calibration", total=None)
        say = lambda what: progress.update(task, description=what)  # noqa: E731
        found = calibrate(model_dir, say)
    write_calibration(found, args.output)
    print(f"{args.output}: {found.model}, {found.dtype}\n{found.machine}")
    print(describe(found))
    return 0


def checkpoint_of(args: argparse.Namespace, progress: "object") -> Path:
    """The one to measure on: the user's, or a made one."""
    if args.model_dir is not None:
        return complete_directory(args.model_dir)
    return made_with_progress(args.shapes, args.layers, args.checkpoint_dir, progress)  # type: ignore[arg-type]


def calibrate(model_dir: Path, say: Callable[[str], None]) -> Calibration:
    """Measures steps alone, then a served cluster of one replica and one shard. Raises SetupError, ClusterError."""
    config = read_config(model_dir)
    say("timing steps")
    parts = parts_of(timed_elsewhere(model_dir, config), config)
    with serve_here(model_dir, served_cache_bytes(config), say) as bench:
        return calibrate_served(parts, bench, say)


def calibrate_served(parts: Calibration, bench: Bench, say: Callable[[str], None]) -> Calibration:
    """With a cluster of one replica and one shard."""
    say("measuring the served cluster")
    bench.run(WARM_UP)
    background_cores = bench.settle()
    return with_served(parts, [bench.run(setting) for setting in SERVED], background_cores)


def served_cache_bytes(config: ModelConfig) -> int:
    """Of an engine that is measured."""
    return 4 * cache_bytes(config, config.dtype)


def served_cache_tokens(config: ModelConfig) -> int:
    return served_cache_bytes(config) // sizes_of(config, config.dtype).kv_bytes_per_token


def timed_elsewhere(model_dir: Path, config: ModelConfig) -> list[StepPoint]:
    """In a process of its own, whose threads are one."""
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(time_steps, model_dir, config.dtype, cache_bytes(config, config.dtype)).result()
    except BrokenProcessPool as error:
        raise ClusterError("the process that timed steps was ended, most likely for want of memory") from error


def parts_of(points: Sequence[StepPoint], config: ModelConfig) -> Calibration:
    """Of a calibration, all that steps alone tell."""
    attention = fit_attention(points)
    num_layers = len(config.sparse_layers)
    experts, call_s = fit_experts(
        points, num_layers=num_layers, num_experts=config.num_experts, top_k=config.num_experts_per_tok
    )
    machine = this_machine()
    return Calibration(
        model=describe_shapes(config),
        dtype=config.dtype,
        machine=describe_machine(machine),
        num_cores=machine.num_cores,
        memory_bytes=machine.memory_bytes,
        num_layers=num_layers,
        num_experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        rows=attention.rows,
        samples=attention.samples,
        context_s=attention.context_s,
        shared=attention.shared,
        experts=experts,
        call_s=call_s,
        crossing=Curve(((1.0, 0.0),)),
        front=FrontCosts(),
        client=FrontCosts(),
    )


def with_served(parts: Calibration, runs: Sequence[Measured], background_cores: float) -> Calibration:
    """Adds what is seen of a served cluster. runs: of SERVED."""
    alone = runs[0]
    in_steps = alone.steps * alone.step_s / alone.setting.num_requests
    front = _front(runs, "front", background_cores)
    found = replace(
        parts,
        crossing=_crossing(runs),
        front=replace(front, latency_s=max(0.0, alone.took_s / alone.setting.num_requests - in_steps)),
        client=_front(runs, "client", 0.0),
    )
    found = _with_serving(found, runs)
    stretches = [run.step_s / simulated.mean_step_s for run, simulated in _simulated(found, runs)]
    return replace(found, stretch=statistics.median(stretches))


def _with_serving(found: Calibration, runs: Sequence[Measured]) -> Calibration:
    """Adds the CPU time that engines and shards took beside that of the products."""
    known, engines, calls = [], [], []
    for run, simulated in _simulated(found, runs):
        steps = simulated.steps
        known.append([1.0, simulated.samples / steps])
        engines.append(max(1e-6, run.core_s["engines"] / run.steps - simulated.attention_s / steps))
        calls.append((run.core_s["shards"] / run.steps - simulated.shard_s / steps) / max(1, found.num_layers))
    step_s, sample_s = least_squares(known, engines)
    call_s = max(0.0, statistics.median(calls))
    return replace(found, serving_step_s=step_s, serving_sample_s=sample_s, serving_call_s=call_s)


def _simulated(found: Calibration, runs: Sequence[Measured]) -> Iterator[tuple[Measured, Record]]:
    for run in runs:
        yield run, predict(found, run.setting)


def _crossing(runs: Sequence[Measured]) -> Curve:
    """Of a call to one shard, against its rows: a round trip without the shard's computation and its queue."""
    known, wanted = [], []
    for run in runs:
        calls = run.figures.get(f"{CALLS}_count", 0.0)
        if calls:
            waits = [run.figures.get(f"{name}_sum", 0.0) for name in (CALLS, "moecluster_shard_queue_wait_seconds")]
            trips = run.figures.get("moecluster_dispatch_round_trip_seconds_sum", 0.0)
            known.append([1.0, run.figures.get("moecluster_shard_rows_total", 0.0) / calls])
            wanted.append(max(1e-6, (trips - sum(waits)) / calls))
    if not known:
        return Curve(((1.0, 0.0),))
    call_s, row_s = least_squares(known, wanted)
    return Curve(((0.0, call_s), (1.0, call_s + row_s)))


def _front(runs: Sequence[Measured], role: str, background_cores: float) -> FrontCosts:
    """Core seconds of requests, tokens and messages."""
    known, used = [], []
    for run in runs:
        requests = run.setting.num_requests
        tokens = requests * run.setting.output_tokens
        known.append([float(requests), float(requests * run.setting.prompt_tokens), run.steps, float(tokens)])
        used.append(max(1e-6, run.core_s[role] - background_cores * run.took_s))
    request_s, prompt_token_s, step_s, token_s = least_squares(known, used)
    return FrontCosts(
        request_s=request_s, prompt_token_s=prompt_token_s, step_s=step_s, token_s=token_s,
        background_cores=background_cores,
    )  # fmt: skip


def describe(found: Calibration) -> str:
    """Some of it, for a reader."""
    one = StepTime.of(found, StepWork(rows=1, samples=1, context=64), 1, 1.0)
    eight = StepTime.of(found, StepWork(rows=8, samples=8, context=512), 1, 1.0)
    lines = [
        f"a decode step of {number}: attention {1000 * time.attention:.1f} ms, experts on one shard "
        f"{1000 * time.shard:.1f}, crossing {1000 * time.crossing:.1f}"
        for number, time in (("1 sequence", one), ("8 sequences", eight))
    ]
    front = found.front
    lines.append(
        f"in front: {1000 * front.request_s:.1f} ms of CPU a request, {1000 * front.step_s:.2f} a step, "
        f"{1000 * front.token_s:.2f} a token, {front.background_cores:.2f} cores without load, "
        f"{1000 * front.latency_s:.1f} ms to an engine and back"
    )
    lines.append(
        f"serving: {1000 * found.serving_step_s:.1f} ms of CPU a step, {1000 * found.serving_sample_s:.2f} a sequence, "
        f"{1000 * found.serving_call_s:.2f} a shard's call; a served step takes {found.stretch:.2f} of the sum"
    )
    return "\n".join(lines)
