"""`moe-cluster bench transport`: times a crossing alone, for each carrier and number of rows, in one run."""

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass

import torch

from cluster.bench.limits import MAX_ROW_BYTES
from cluster.bench.machine import this_machine
from cluster.bench.report import describe_machine, markdown_table
from cluster.errors import SetupError
from cluster.experts.transport import ExpertBatch, ExpertTransport

_TOP_K = 4
_TIMEOUT_S = 30.0
_ROUNDS = 5  # each carrier in turn, so that a busy moment meets all


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTrip:
    """Milliseconds from the first byte sent to the last shard's rows."""

    carrier: str
    rows: int
    median_ms: float
    p90_ms: float


def measure_round_trips(args: argparse.Namespace) -> int:
    """Measures, prints a table, returns the exit code. Raises SetupError."""
    if args.shards < 1 or args.repeat < _ROUNDS or args.hidden_size < 1 or not args.rows or args.rows[0] < 1:
        raise SetupError(f"--shards, --rows and --hidden-size must be at least 1, --repeat at least {_ROUNDS}")
    num_bytes = max(args.rows) * args.hidden_size * torch.bfloat16.itemsize
    if num_bytes > MAX_ROW_BYTES:
        raise SetupError(
            f"--rows and --hidden-size make {num_bytes} bytes, {MAX_ROW_BYTES} are possible: ask for fewer"
        )
    os.environ["OMP_WAIT_POLICY"] = "passive"
    torch.set_num_threads(1)
    from cluster.runtime.start.echo import echo_transports  # Ray loads with it

    results = []
    with echo_transports(args.shards, args.ray_address) as transports:
        for rows in args.rows:
            samples: dict[str, list[float]] = {carrier: [] for carrier in transports}
            batch = _batch(rows, args.hidden_size)
            for round_id in range(_ROUNDS + 1):
                for carrier, transport in transports.items():
                    took = [_cross(transport, args.shards, batch) for _ in range(args.repeat // _ROUNDS)]
                    if round_id:  # the first warms up
                        samples[carrier] += took
            for carrier, took in samples.items():
                ordered = sorted(took)
                p90 = ordered[int(0.9 * len(ordered))]
                results.append(
                    RoundTrip(carrier=carrier, rows=rows, median_ms=1e3 * statistics.median(took), p90_ms=1e3 * p90)
                )
            print(f"{rows} rows: done", file=sys.stderr)
    _print(results, args)
    if args.json:
        args.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    return 0


def _batch(rows: int, hidden_size: int) -> ExpertBatch:
    return ExpertBatch(
        layer_id=0,
        epoch=1,
        hidden_states=torch.randn(rows, hidden_size).bfloat16(),
        topk_ids=torch.zeros((rows, _TOP_K), dtype=torch.int64),
        topk_weights=torch.ones((rows, _TOP_K)),
    )


def _cross(transport: ExpertTransport, num_shards: int, batch: ExpertBatch) -> float:
    """Seconds to all shards and back, as a layer does it: all sent, then all received."""
    started = time.perf_counter()
    flights = [transport.submit(shard_id, batch) for shard_id in range(num_shards)]
    for flight in flights:
        flight.result(_TIMEOUT_S)
    return time.perf_counter() - started


def _print(results: list[RoundTrip], args: argparse.Namespace) -> None:
    by_ray = {result.rows: result.median_ms for result in results if result.carrier == "ray"}
    table: list[tuple[str, ...]] = [("rows", "carrier", "median ms", "90 % ms", "of ray's")]
    for result in results:
        table.append(
            (
                str(result.rows), result.carrier, f"{result.median_ms:.2f}", f"{result.p90_ms:.2f}",
                f"{result.median_ms / by_ray[result.rows]:.2f}",
            )
        )  # fmt: skip
    print(describe_machine(this_machine()))
    print(
        f"\nRound trip to {args.shards} shards that send back what they get; rows of {args.hidden_size} bfloat16 for "
        f"each shard, {args.repeat} round trips.\n"
    )
    print("\n".join(markdown_table(table)))
