"""The options of `plan --trace`, and the replay that they make."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.cli import capacity
from cluster.errors import SetupError

if TYPE_CHECKING:
    from cluster.checkpoint.sizes import ModelSizes
    from cluster.config import EngineConfig, ModelConfig
    from cluster.planning.capacity import Replay

DEFAULTS: dict[str, Any] = {"attention_replicas": 1, "recovery": 30.0, "start": 60.0, "imbalance": 1.0}
OPTIONS = (*DEFAULTS, "max_attention_replicas", "mean_life")
MOST_REPLICAS, MOST_S = 4096, 1e9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "trace", "how a cluster of --attention-replicas and --shards answers requests that came elsewhere"
    )
    group.add_argument(
        "--trace", type=Path, metavar="FILE",
        help="a JSON object a line: arrival_s, prompt_tokens, output_tokens; Mooncake's traces too",
    )  # fmt: skip
    for name, text in (
        ("--attention-replicas", "to begin with, and at least (default: 1)"),
        ("--max-attention-replicas", "by Serve's policy, as of `serve`; with --gpu alone (unset: their number stays)"),
    ):
        group.add_argument(name, type=int, metavar="N", help=text)
    for name, text in (
        ("--mean-life", "of each process, until it dies (unset: none dies)"),
        ("--recovery", "until the successor of one that died answers (default: 30)"),
        ("--start", "of a further replica (default: 60)"),
    ):
        group.add_argument(name, type=float, metavar="SECONDS", help=text)
    group.add_argument(
        "--imbalance", type=float, metavar="X",
        help="the busiest shard's load over the mean, as `status` shows it (default: 1)",
    )  # fmt: skip


def check(args: argparse.Namespace) -> None:
    """Raises SetupError."""
    capacity.check_needed(args, OPTIONS, "trace")
    if args.trace is None:
        return
    if args.rate is not None:
        raise SetupError("--trace and --rate are two questions: --trace has its own rate")
    if (args.gpu is None) == (args.calibration is None):
        raise SetupError("--trace is of a cluster: give --gpu or --calibration, one of the two")
    capacity.check_needed(args, ("recovery",), "mean_life")
    capacity.check_needed(args, ("start",), "max_attention_replicas")
    for name in ("attention_replicas", "max_attention_replicas"):
        capacity.check_number(args, name, MOST_REPLICAS)
    for name in ("mean_life", "recovery", "start"):
        capacity.check_number(args, name, MOST_S)
    least, most = _chosen(args, "attention_replicas"), args.max_attention_replicas
    if most is not None and most < least:
        raise SetupError(f"--max-attention-replicas is {most}, less than --attention-replicas, {least}")
    if most is not None and args.gpu is None:
        raise SetupError("--max-attention-replicas is of GPUs: machines of a --calibration have no room for more")
    if args.imbalance is not None and not 1 <= args.imbalance <= capacity.MOST:
        raise SetupError(f"--imbalance is {args.imbalance:g}, 1 to {capacity.MOST:,.0f} is needed")


def replayed(
    args: argparse.Namespace, config: "ModelConfig", sizes: "ModelSizes", engine: "EngineConfig"
) -> "Replay | None":
    """The trace on the cluster; None where none was given. Shows how far it is. Raises SetupError."""
    if args.trace is None:
        return None
    from dataclasses import replace

    from cluster.checkpoint.info import max_model_len
    from cluster.drawing import bars
    from cluster.planning.capacity import base_cluster, replay
    from cluster.planning.changes import Events, Failures, Scaling
    from cluster.planning.search import with_size
    from cluster.planning.trace import read_trace

    hardware = capacity.hardware_of(args, config, sizes)
    base = base_cluster(hardware, config, sizes, engine)
    shards = _shards(args, base.shards, hardware.name) if config.num_experts else 0
    cluster = replace(
        with_size(base, _chosen(args, "attention_replicas"), shards), imbalance=_chosen(args, "imbalance")
    )
    most, life = args.max_attention_replicas, args.mean_life
    events = Events(
        failures=None if life is None else Failures(mean_s=life, recovery_s=_chosen(args, "recovery")),
        scaling=None if most is None else Scaling(most=most, start_s=_chosen(args, "start")),
    )
    load = read_trace(args.trace)
    with bars() as progress:
        task = progress.add_task("requests", total=load.num_requests)
        return replay(
            hardware, cluster, load, events=events, context_tokens=max_model_len(config, engine),
            report=lambda ended: progress.update(task, completed=ended),
        )  # fmt: skip


def _chosen(args: argparse.Namespace, name: str) -> Any:
    value = getattr(args, name)
    return DEFAULTS[name] if value is None else value


def _shards(args: argparse.Namespace, least: int, name: str) -> int:
    """Raises SetupError."""
    if args.shards is None:
        raise SetupError(f"--trace is of a cluster: give --shards too, at least {least} of {name}")
    if args.shards < least:
        raise SetupError(f"--shards is {args.shards}, the experts need {least} of {name} at least")
    return int(args.shards)
