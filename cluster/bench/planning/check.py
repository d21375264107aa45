"""`moe-cluster bench plan-check`: calibrates, then measures other settings than the calibration's beside the planner's
answers."""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cluster.bench.checkpoint import read_config
from cluster.bench.limits import check_output
from cluster.bench.machine import this_machine
from cluster.bench.planning.calibrate import (
    calibrate_served,
    checkpoint_of,
    describe,
    parts_of,
    served_cache_bytes,
    served_cache_tokens,
    timed_elsewhere,
)
from cluster.bench.planning.predict import predict
from cluster.bench.planning.served import TURNS, Bench, Measured, Setting, check_seconds, serve_here
from cluster.bench.report import describe_machine, markdown_table
from cluster.drawing import bars
from cluster.errors import SetupError
from cluster.planning.calibration import Calibration, check_model, read_calibration, write_calibration
from cluster.planning.simulation import Record

WANTED = 0.25  # of the measured value
SATURATING = 32  # streams, by whose predicted requests/s the open loops' rates are chosen
_BASE = Setting(replicas=1, shards=1, prompt_tokens=64, output_tokens=32, num_requests=0, seed=100)
# (setting, share of the predicted highest rate; 0 for a closed loop)
SETTINGS: tuple[tuple[Setting, float], ...] = (
    (replace(_BASE, concurrency=4), 0.0),
    (replace(_BASE, concurrency=12), 0.0),
    (replace(_BASE, concurrency=8, prompt_tokens=512), 0.0),
    (_BASE, 0.4),
    (replace(_BASE, shards=2, concurrency=8), 0.0),
    (replace(_BASE, shards=2), 0.85),
    (replace(_BASE, shards=2, replicas=2, concurrency=16), 0.0),
    (replace(_BASE, shards=2, replicas=2), 0.6),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """Of one setting. predicted, measured: requests/s, then medians in milliseconds: to the first token, for each
    further one, to the last one."""

    setting: Setting
    predicted: tuple[float, float, float, float]
    measured: tuple[float, float, float, float]

    @property
    def ratios(self) -> tuple[float, ...]:
        return tuple(p / m for p, m in zip(self.predicted, self.measured, strict=True))


def measure_check(args: argparse.Namespace) -> int:
    """Prints a table; 1 where a value is further than WANTED from the measured one. Raises SetupError, ClusterError."""
    check_options(args)
    with bars() as progress:
        model_dir = checkpoint_of(args, progress)
        task = progress.add_task("plan-check", total=None)

        def say(what: str) -> None:
            progress.update(task, description=what)

        found, compared = compare(model_dir, args, say)
    print(f"{describe_machine(this_machine())}\n\nModel: {found.model}, {found.dtype}.\n\n{describe(found)}\n")
    print("\n".join(markdown_table(rows_of(compared))))
    missed = [ratio for one in compared for ratio in one.ratios if abs(ratio - 1) > WANTED]
    print(f"\n{len(missed)} of {4 * len(compared)} further than {WANTED:.0%} from the measured value")
    if args.json:
        args.json.write_text(json.dumps([asdict(one) for one in compared], indent=2) + "\n")
    return 1 if missed else 0


def check_options(args: argparse.Namespace) -> None:
    """Raises SetupError."""
    check_seconds(args.seconds)
    if args.output is not None:
        if args.calibration is not None:
            raise SetupError("--output is of a calibration that is made now: leave it out, or --calibration")
        check_output("--output", args.output)
    if args.calibration is not None:
        read_calibration(args.calibration)


def compare(
    model_dir: Path, args: argparse.Namespace, say: Callable[[str], None]
) -> tuple[Calibration, list[Compared]]:
    """With one served cluster for the calibration and for all settings."""
    config = read_config(model_dir)
    found = None
    if args.calibration is not None:
        found = read_calibration(args.calibration)
        check_model(found, config, config.dtype, args.calibration)
    else:
        say("timing steps")
        parts = parts_of(timed_elsewhere(model_dir, config), config)
    cache_tokens = served_cache_tokens(config)
    with serve_here(model_dir, served_cache_bytes(config), say) as bench:
        if found is None:
            found = calibrate_served(parts, bench, say)
            if args.output is not None:
                write_calibration(found, args.output)
        return found, list(_compare_all(found, bench, args.seconds, cache_tokens, say))


def _compare_all(
    found: Calibration, bench: Bench, seconds: float, cache_tokens: int, say: Callable[[str], None]
) -> Sequence[Compared]:
    compared = []
    for number, (base, share) in enumerate(SETTINGS):
        setting = sized(found, base, share, seconds)
        setting = replace(setting, seed=base.seed + number)
        say(f"{number + 1} of {len(SETTINGS)}: {setting.replicas} replicas, {setting.shards} shards, {setting.load}")
        bench.scale(setting.replicas, setting.shards)
        predicted = predict(found, setting, cache_tokens)
        compared.append(Compared(setting=setting, predicted=of_record(predicted), measured=of_run(bench.run(setting))))
    return compared


def sized(found: Calibration, base: Setting, share: float, seconds: float) -> Setting:
    """With as many requests as take so long, by the planner, and at a rate that is a share of the highest."""
    streams = base.concurrency or SATURATING
    trial = predict(found, replace(base, concurrency=streams, rate=None, num_requests=TURNS * streams))
    rate = share * trial.requests_s or trial.requests_s
    num_requests = max(TURNS, TURNS * base.concurrency, round(rate * seconds))
    return replace(base, num_requests=num_requests, rate=rate if share else None)


def of_record(record: Record) -> tuple[float, float, float, float]:
    medians = [1000 * statistics.median(some) for some in (record.first_token_s, record.per_token_s, record.whole_s)]
    return (record.requests_s, medians[0], medians[1], medians[2])


def of_run(run: Measured) -> tuple[float, float, float, float]:
    traffic = run.traffic
    return (run.requests_s, traffic.first_token_ms[0], traffic.per_token_ms[0], traffic.whole_ms[0])


def rows_of(compared: Sequence[Compared]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        ("replicas", "shards", "prompt", "load", "requests/s", "first token, ms", "a token, ms", "answer, ms")
    ]
    for one in compared:
        setting = one.setting
        cells = [
            f"{predicted:.3g} / {measured:.3g} ({ratio:.2f})"
            for predicted, measured, ratio in zip(one.predicted, one.measured, one.ratios, strict=True)
        ]
        rows.append((str(setting.replicas), str(setting.shards), str(setting.prompt_tokens), setting.load, *cells))
    return rows
