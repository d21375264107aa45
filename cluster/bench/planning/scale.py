"""`moe-cluster bench scale`: requests/s of one cluster against its attention replicas and expert shards."""

import argparse
import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cluster.bench.checkpoint import read_config
from cluster.bench.machine import this_machine
from cluster.bench.planning.calibrate import checkpoint_of, served_cache_bytes, served_cache_tokens
from cluster.bench.planning.predict import predict
from cluster.bench.planning.served import TURNS, Bench, Setting, answered, check_seconds, serve_here
from cluster.bench.report import describe_machine, markdown_table
from cluster.client import options
from cluster.drawing import bars
from cluster.errors import SetupError
from cluster.footprint.servers import find_address
from cluster.planning.calibration import Calibration, check_model, read_calibration
from cluster.runtime.start.ray_address import find_ray

BAR_CELLS = 24  # of the longest bar
_EIGHTHS = " ▏▎▍▌▋▊▉"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled:
    """Milliseconds are medians.  predicted_requests_s: the planner's; None without a calibration."""

    replicas: int
    shards: int
    requests_s: float
    tokens_s: float
    first_token_ms: float
    per_token_ms: float
    predicted_requests_s: float | None = None


def measure_scale(args: argparse.Namespace) -> int:
    """Prints a table with bars; 0, as a request that fails is an error. Raises SetupError, ClusterError."""
    check_options(args)
    with ExitStack() as stack:
        progress = stack.enter_context(bars())
        task = progress.add_task("scale", total=None)

        def say(what: str) -> None:
            progress.update(task, description=what)

        if args.address is None:
            model_dir = checkpoint_of(args, progress)
            prediction = _prediction(model_dir, args.calibration)
            config = read_config(model_dir)
            bench = stack.enter_context(serve_here(model_dir, served_cache_bytes(config), say))
            title = f"{describe_machine(this_machine())}\n\n"
        else:
            bench, prediction, title = stack.enter_context(_running(args)), None, ""
            stack.enter_context(as_it_was(bench, say))
        found = list(_measure_all(bench, args, prediction, say))
    print(f"{title}{args.concurrency} streams, {args.prompt_tokens} tokens in, {args.output_tokens} out.\n")
    print("\n".join(markdown_table(rows_of(found))))
    if args.json:
        args.json.write_text(json.dumps([asdict(one) for one in found], indent=2) + "\n")
    return 0


def check_options(args: argparse.Namespace) -> None:
    """Raises SetupError."""
    for name in ("attention_replicas", "shards", "concurrency", "prompt_tokens", "output_tokens"):
        given = getattr(args, name)
        least = min(given) if isinstance(given, tuple) else given
        if least < 1:
            raise SetupError(f"--{name.replace('_', '-')} has {least}, at least 1 is needed")
    check_seconds(args.seconds)
    if args.address is not None and (args.model_dir is not None or args.calibration is not None):
        raise SetupError("MODEL and --calibration are of a cluster that is started here: leave them out, or --address")
    if args.address is None and args.ray_address is not None:
        raise SetupError("--ray-address is of a running cluster: give its --address, too")


def _prediction(model_dir: Path, path: Path | None) -> Callable[[Setting], float] | None:
    """Requests/s by the planner. Raises SetupError."""
    if path is None:
        return None
    config = read_config(model_dir)
    found: Calibration = read_calibration(path)
    check_model(found, config, config.dtype, path)
    cache_tokens = served_cache_tokens(config)
    return lambda setting: predict(found, setting, cache_tokens).requests_s


@contextmanager
def _running(args: argparse.Namespace) -> Iterator[Bench]:
    """The cluster that serves at --address. Raises SetupError."""
    address = find_ray(find_address(args.ray_address or os.environ.get("RAY_ADDRESS")))
    from cluster.runtime.operate import RunningCluster  # Ray loads with it, and reads what the search has found

    with RunningCluster(address) as cluster:
        yield Bench(cluster, lambda: options.connect(args, goes_on=False), root=None)


@contextmanager
def as_it_was(bench: Bench, say: Callable[[str], None]) -> Iterator[None]:
    """Gives the cluster the processes back that it had, whatever happens, also where others do not run yet."""
    replicas, shards = bench.size
    try:
        yield
    finally:
        say(f"back to {replicas} replicas and {shards} shards")
        bench.scale(replicas, shards)


def _measure_all(
    bench: Bench, args: argparse.Namespace, prediction: Callable[[Setting], float] | None, say: Callable[[str], None]
) -> Iterator[Scaled]:
    """A dense model has no shards, and is measured with 0."""
    shards = (0,) if bench.cluster.status().dense else args.shards
    sizes = list(itertools.product(shards, args.attention_replicas))
    for number, (num_shards, num_replicas) in enumerate(sizes, 1):
        say(f"{number} of {len(sizes)}: {num_replicas} attention replicas, {num_shards} shards")
        bench.scale(num_replicas, num_shards)
        trial = Setting(
            replicas=num_replicas, shards=num_shards, concurrency=args.concurrency, num_requests=args.concurrency,
            prompt_tokens=args.prompt_tokens, output_tokens=args.output_tokens, seed=2 * number,
        )  # fmt: skip
        yield measured(bench, trial, args.seconds, prediction)


def measured(bench: Bench, trial: Setting, seconds: float, prediction: Callable[[Setting], float] | None) -> Scaled:
    """Sends the trial's requests, then as many as take so long."""
    _, took_s = bench.load(trial)
    num_requests = max(TURNS * trial.concurrency, round(trial.num_requests / took_s * seconds))
    setting = replace(trial, num_requests=num_requests, seed=trial.seed + 1)
    traffic, took_s = bench.load(setting)
    return Scaled(
        replicas=setting.replicas,
        shards=setting.shards,
        requests_s=answered(traffic) / took_s,
        tokens_s=traffic.tokens_per_s,
        first_token_ms=traffic.first_token_ms[0],
        per_token_ms=traffic.per_token_ms[0],
        predicted_requests_s=prediction(setting) if prediction is not None else None,
    )


def rows_of(found: list[Scaled]) -> list[tuple[str, ...]]:
    """The table. Bars are as long as requests/s are many, in eighths of a cell."""
    predicted = found[0].predicted_requests_s is not None
    heads = ["shards", "replicas", "requests/s", *(["the planner's"] if predicted else []), "of the first"]
    rows = [(*heads, "tokens/s", "first token, ms", "a token, ms", "requests/s, drawn")]
    most = max(one.requests_s for one in found)
    for one in found:
        cells = [str(one.shards), str(one.replicas), f"{one.requests_s:.3g}"]
        if one.predicted_requests_s is not None:
            cells.append(f"{one.predicted_requests_s:.3g} ({one.predicted_requests_s / one.requests_s:.2f})")
        cells += [f"{one.requests_s / found[0].requests_s:.2f}", f"{one.tokens_s:.3g}", f"{one.first_token_ms:.3g}"]
        rows.append((*cells, f"{one.per_token_ms:.3g}", bar(one.requests_s / most)))
    return rows


def bar(share: float) -> str:
    """Of at most BAR_CELLS cells."""
    eighths = round(share * BAR_CELLS * 8)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
