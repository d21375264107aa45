"""The options of `plan --trace`, and the replay that they make."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.cli import capacity
from cluster.errors import SetupError

if TYPE_CHECKING:
    from cluster.checkpoint.sizes import ModelSizes
    from cluster.config import EngineConfig, ModelConfig
    from cluster.planning.capacity import Replay

COUNTS = ("attention_replicas", "max_attention_replicas")
SECONDS = ("mean_life", "recovery", "start")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "trace", "how a cluster of --attention-replicas and --shards answers requests that came elsewhere"
    )
    group.add_argument(
        "--trace", type=Path, metavar="FILE",
        help="a JSON object a line: arrival_s, prompt_tokens, output_tokens; Mooncake's traces too",
    )  # fmt: skip
    for name, default, text in (
        ("--attention-replicas", 1, "to begin with (default: 1)"),
        ("--max-attention-replicas", None, "by Serve's policy, as of `serve` (unset: their number stays)"),
    ):
        group.add_argument(name, type=int, default=default, metavar="N", help=text)
    for name, seconds, text in (
        ("--mean-life", None, "of each process, until it dies (unset: none dies)"),
        ("--recovery", 30.0, "until the successor of one that died answers (default: 30)"),
        ("--start", 60.0, "of a further replica (default: 60)"),
    ):
        group.add_argument(name, type=float, default=seconds, metavar="SECONDS", help=text)
    group.add_argument(
        "--imbalance", type=float, default=1.0, metavar="X",
        help="the busiest shard's load over the mean, as `status` shows it (default: 1)",
    )  # fmt: skip


def check(args: argparse.Namespace) -> None:
    """Raises SetupError."""
    if args.trace is None:
        return
    if args.rate is not None:
        raise SetupError("--trace and --rate are two questions: --trace has its own rate")
    if args.shards is None or (args.gpu is None) == (args.calibration is None):
        raise SetupError("--trace is of a cluster: give --shards, and --gpu or --calibration, one of the two")
    for name in COUNTS:
        value = getattr(args, name)
        if value is not None and not 1 <= value <= capacity.MOST:
            raise SetupError(f"--{name.replace('_', '-')} is {value}, at least 1 is needed")
    for name in SECONDS:
        value = getattr(args, name)
        if value is not None and not 0 < value <= 1e9:
            raise SetupError(f"--{name.replace('_', '-')} is {value:g}, above 0 and at most 1e9 is needed")
    if not 1 <= args.imbalance <= capacity.MOST:
        raise SetupError(f"--imbalance is {args.imbalance:g}, 1 and more is needed")


def replayed(
    args: argparse.Namespace, config: "ModelConfig", sizes: "ModelSizes", engine: "EngineConfig"
) -> "Replay | None":
    """The trace on the cluster; None where none was given. Shows how far it is. Raises SetupError."""
    if args.trace is None:
        return None
    from dataclasses import replace

    from cluster.drawing import bars
    from cluster.planning.capacity import base_cluster, replay
    from cluster.planning.changes import Events, Failures, Scaling
    from cluster.planning.search import with_size
    from cluster.planning.trace import read_trace

    hardware = capacity.hardware_of(args, config, sizes)
    base = base_cluster(hardware, config, sizes, engine)
    if args.shards < base.shards:
        raise SetupError(f"--shards is {args.shards}, the experts need {base.shards} of {hardware.name} at least")
    shards = args.shards if config.num_experts else 0
    cluster = replace(with_size(base, args.attention_replicas, shards), imbalance=args.imbalance)
    most, life = args.max_attention_replicas, args.mean_life
    events = Events(
        failures=None if life is None else Failures(mean_s=life, recovery_s=args.recovery),
        scaling=None if most is None else Scaling(most=most, start_s=args.start),
    )
    load = read_trace(args.trace)
    with bars() as progress:
        task = progress.add_task("requests", total=load.num_requests)
        return replay(hardware, cluster, load, events, lambda ended: progress.update(task, completed=ended))
