"""Options that several commands have, and the configuration that they make."""

import argparse
import os
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from cluster.config import ClusterConfig
from cluster.config.resources import available_cpus
from cluster.inputs import shown

_SIZE = re.compile(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([KMGT]?)(i?B?)\s*", re.IGNORECASE)


def byte_size(text: str) -> int:
    """512MiB, 8G, 1.5 GB or 1073741824: KiB, MiB … are powers of 1024, and so are K, M …; KB, MB … of 1000."""
    found = _SIZE.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{shown(text)} is no size: 1073741824, 8GiB, 512MiB or 8.5GB are some")
    figure, unit, suffix = found.groups()
    return int(float(figure) * (1000 if suffix.lower() == "b" else 1024) ** " kmgt".index(unit.lower() or " "))


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], help_text: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=help_text, description=help_text[0].upper() + help_text[1:] + "."
    )
    parser.set_defaults(run=run)
    return parser


def add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `ClusterConfig`, with its defaults, and of this machine's ports."""
    default = {f.name: f.default for f in fields(ClusterConfig)}

    def add(name: str, kind: Callable[[str], Any], text: str, metavar: str = "N") -> None:
        shown = "" if default[name] is None else f" (default: {default[name]})"
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=kind, default=default[name], metavar=metavar, help=text + shown)

    add("expert_shards", int, "processes that share the routed experts; a dense model has none")
    add("attention_replicas", int, "processes with the dense weights and a KV cache")
    add("min_copies", int, "copies of each expert, on different shards")
    add("redundant_experts", int, "further copies a layer, of the busiest experts")
    add("dtype", str, "float32, bfloat16, float16 or auto: the checkpoint's", "TYPE")
    add("device", str, "cpu, cuda or auto: cuda where there is one", "DEVICE")
    add("transport", str, "auto (streams, and Ray calls while one is down), stream or ray", "NAME")
    add(
        "kv_cache_bytes",
        byte_size,
        "memory for each attention replica's keys and values, 8GiB too; default: as next",
        "BYTES",
    )
    add("memory_utilization", float, "share of free memory for it, default: 0.9 on a GPU, else 0.5", "X")
    add("max_num_seqs", int, "sequences in one step at most")
    add("max_num_batched_tokens", int, "tokens in one step at most, prefill and decode together")
    add("max_model_len", int, "prompt and output at most, default: what the checkpoint allows")
    add("max_waiting", int, "requests that may queue for a replica before a further one is refused")
    add("gpus_per_attention_replica", float, "GPUs, fractions allowed; default: 1 where Ray has any", "X")
    add("gpus_per_expert_shard", float, "GPUs, fractions allowed; default: 1 where Ray has any", "X")
    for role in ("attention_replica", "expert_shard"):
        parser.add_argument(
            f"--cpus-per-{role.replace('_', '-')}", type=float, metavar="X",
            help="CPU threads (default: this machine's cores divided by the processes of the role; 1 elsewhere)",
        )  # fmt: skip
    add("recovery_timeout_s", float, "how long requests wait for a lost shard's successor", "SECONDS")
    add("drain_timeout_s", float, "how long a stop waits for running requests", "SECONDS")
    add("metrics_port", int, "where /metrics is served; 0: a free port (demo: 0)", "PORT")
    add("log_format", str, "of all processes' log lines: text, or json, one object a line", "FORMAT")
    parser.add_argument(
        "--log-requests", action="store_true", help="a log line for each request (default: for those that fail)"
    )
    parser.add_argument(
        "--grpc-port", type=int, default=9000, metavar="PORT", help="0: a free one (default: 9000, demo: 0)"
    )
    parser.add_argument(
        "--proxy", choices=("haproxy", "serve"), default="haproxy",
        help="what takes the connections: HAProxy, or Serve's own proxy (default: %(default)s; "
        "a running Ray cluster decides by its environment)",
    )  # fmt: skip
    add_ray_address(parser, "else a Ray of this machine is started")


def add_security_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--api-keys-file",
        default="",
        metavar="FILE",
        help="with hashed keys (`moe-cluster keys new`); clients need one",
    )
    parser.add_argument(
        "--max-streams-per-client",
        type=int,
        default=0,
        metavar="N",
        help="requests of a client at a time (default: any)",
    )
    parser.add_argument(
        "--host", default="", metavar="HOST", help="where gRPC listens; 0.0.0.0: on all interfaces (default: 127.0.0.1)"
    )
    parser.add_argument(
        "--tls-cert", type=Path, metavar="FILE", help="PEM of this server's certificate and chain: TLS only"
    )
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="PEM of its key (default: in the same file)")
    parser.add_argument(
        "--tls-client-ca", type=Path, metavar="FILE", help="PEM of who signs clients' certificates; they need one then"
    )


def add_ray_address(parser: argparse.ArgumentParser, otherwise: str = "else that of `moe-cluster serve` here") -> None:
    parser.add_argument(
        "--ray-address", default=os.environ.get("RAY_ADDRESS"), metavar="ADDRESS",
        help=f"a running Ray cluster (default: $RAY_ADDRESS, {otherwise})",
    )  # fmt: skip


def cluster_config(args: argparse.Namespace, model: str) -> ClusterConfig:
    """Attention and experts take turns, so each role gets all cores of a machine that is its own: 71.5 instead of 58.4
    tokens/s over 32 streams (BENCHMARKS.md)."""
    names = {f.name for f in fields(ClusterConfig)} & vars(args).keys() - {"model"}
    given = {name: getattr(args, name) for name in names}
    cores = 1 if args.ray_address else available_cpus()
    for cpus, processes in (
        ("cpus_per_attention_replica", args.attention_replicas),
        ("cpus_per_expert_shard", args.expert_shards),
    ):
        if given[cpus] is None:
            given[cpus] = float(max(1, cores // max(1, processes)))
    if given.get("api_keys_file"):
        given["api_keys_file"] = str(Path(given["api_keys_file"]).resolve())
    return ClusterConfig(model=str(Path(model).resolve()), **given)


def serve_options(args: argparse.Namespace) -> Any:
    from cluster.runtime.grpc_front import GrpcFront
    from cluster.runtime.launch import ServeOptions

    given = {f.name: getattr(args, f.name) for f in fields(GrpcFront) if hasattr(args, f.name)}
    return ServeOptions(
        grpc_port=args.grpc_port,
        ray_address=args.ray_address,
        haproxy=args.proxy == "haproxy",
        front=GrpcFront(**given),
    )
