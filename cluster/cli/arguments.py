"""Options that several commands have, and the configuration that they make."""

import argparse
import json
import os
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from cluster.checkpoint.model_files import located
from cluster.config import DEFAULTS, ClusterConfig
from cluster.config.options import doc_of, type_of
from cluster.config.resources import available_cpus
from cluster.config.speculation import with_model
from cluster.inputs import shown

if TYPE_CHECKING:
    from cluster.runtime.start.served import ServeOptions

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # as `add_subparsers` makes them

OPTIONS = (  # fields of ClusterConfig; the rest has no option
    "expert_shards", "attention_replicas", "min_copies", "redundant_experts", "dtype", "quantization",
    "expert_quantization", "kv_cache_dtype", "device", "transport", "kv_cache_bytes", "memory_utilization",
    "max_num_seqs", "max_num_batched_tokens", "max_model_len", "rope_scaling", "tensor_parallel_size",
    "speculative_config", "max_waiting",
    "balancer", "gpus_per_attention_replica", "gpus_per_expert_shard", "recovery_timeout_s", "drain_timeout_s",
    "metrics_port", "log_format", "tracing_endpoint", "tracing_ratio",
)  # fmt: skip
SECURITY_OPTIONS = ("api_keys_file", "admin_keys_file", "max_streams_per_client")
UNITS = {"_s": "SECONDS", "_bytes": "BYTES", "_port": "PORT", "_file": "FILE"}
_SIZE = re.compile(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([KMGT]?)(i?B?)\s*", re.IGNORECASE)


def byte_size(text: str) -> int:
    """Reads 512MiB, 8G, 1.5 GB or 1073741824: KiB, MiB … and K, M … are powers of 1024, KB, MB … of 1000."""
    found = _SIZE.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{shown(text)} is no size: 1073741824, 8GiB, 512MiB or 8.5GB are some")
    figure, unit, suffix = found.groups()
    return int(float(figure) * (1000 if suffix.lower() == "b" else 1024) ** " kmgt".index(unit.lower() or " "))


def port_or_none(text: str) -> int | None:
    """Reads a port; None for the word none."""
    if text == "none":
        return None
    if not re.fullmatch("[0-9]{1,25}", text):  # Python reads none of over 4,300 digits
        raise argparse.ArgumentTypeError(f"{shown(text)} is no port: 8000, 0 for a free one, or none")
    return int(text)


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{shown(text)} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{shown(text)} is no JSON object")
    return value


def add_command(
    commands: "Commands", name: str, run: Callable[[argparse.Namespace], int], help_text: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help_text, description=help_text[0].upper() + help_text[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def add_cluster_arguments(
    parser: argparse.ArgumentParser, *, grpc_port: int = 9000, http_port: int = 8000, **defaults: Any
) -> None:
    """Adds options of `ClusterConfig`, with its help texts and defaults, and of this machine's ports.

    defaults: in place of ClusterConfig's.
    """
    for name in OPTIONS:
        _add_option(parser, name, (DEFAULTS | defaults)[name])
    for role in ("attention_replica", "expert_shard"):
        name = f"cpus_per_{role}"
        instead = "this machine's cores divided by the processes of the role; 1 on a Ray of yours"
        _add_option(parser, name, None, f" (default: {instead})")
    parser.add_argument(
        "--served-model-name", nargs="+", metavar="NAME",
        help="the name that clients see, and further ones by which they may ask for the model "
        "(default: the directory's name, or the model's on the hub)",
    )  # fmt: skip
    add_adapters(parser)
    for name in ("log_requests", "skip_tokenizer", "tracing"):
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=_doc(name))
    parser.add_argument(
        "--grpc-port", type=int, default=grpc_port, metavar="PORT", help="0: a free one (default: %(default)s)"
    )
    parser.add_argument(
        "--http-port", type=port_or_none, default=http_port, metavar="PORT",
        help="of OpenAI's API over HTTP; 0: a free one; none: no HTTP API (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--proxy", choices=("haproxy", "serve"), default="haproxy",
        help="takes the connections: HAProxy, or Serve's own proxy (default: %(default)s; "
        "a running Ray cluster decides by its environment)",
    )  # fmt: skip
    add_ray_address(parser, "else a Ray of this machine is started")


def _add_option(parser: argparse.ArgumentParser, name: str, default: Any, note: str = "") -> None:
    """note: in the help, in place of the default."""
    if default not in (None, ""):
        note = f" (default: {default})"
    kind: Callable[[str], Any] = type_of(ClusterConfig, name)
    metavar = {float: "X", int: "N"}.get(kind, name.rpartition("_")[2].upper())  # type: ignore[call-overload]
    for ending, unit in UNITS.items():
        metavar = unit if name.endswith(ending) else metavar
    if name in ("rope_scaling", "speculative_config"):
        kind, metavar = json_object, "JSON"
    if name.endswith("_bytes"):
        kind, note = byte_size, f" (8GiB, 512MB …){note}"
    parser.add_argument(
        f"--{name.replace('_', '-')}", type=kind, default=default, metavar=metavar, help=_doc(name) + note
    )


def _doc(name: str) -> str:
    """Returns a field's help text for argparse, where `%` has a meaning."""
    return doc_of(ClusterConfig.__dataclass_fields__[name]).replace("%", "%%")


def add_options(parser: argparse.ArgumentParser, *names: str) -> None:
    """Adds options of `ClusterConfig` with its help texts and defaults."""
    for name in names:
        _add_option(parser, name, DEFAULTS[name])


def add_adapters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lora-adapters", nargs="+", action=_Adapters, metavar="NAME=PATH",
        help=_doc("lora_adapters"),
    )  # fmt: skip
    add_options(parser, "max_lora_rank", "max_loras")


class _Adapters(argparse.Action):
    """Reads NAME=PATH, several of them, into a mapping."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        found = dict(getattr(namespace, self.dest) or {})
        for value in values:
            name, equals, path = value.partition("=")
            if not equals or not name or not path:
                raise argparse.ArgumentError(self, f"{shown(value)} is no NAME=PATH")
            if name in found:
                raise argparse.ArgumentError(self, f"the name {shown(name)} is there twice")
            found[name] = str(Path(path).resolve())
        setattr(namespace, self.dest, found)


def add_security_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, *SECURITY_OPTIONS)
    parser.add_argument(
        "--host",
        default="",
        metavar="HOST",
        help="address for gRPC and HTTP; 0.0.0.0: all interfaces (default: 127.0.0.1)",
    )
    parser.add_argument(
        "--tls-cert", type=Path, metavar="FILE", help="PEM of this server's certificate and chain: TLS only"
    )
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="PEM of its key (default: in the same file)")
    parser.add_argument(
        "--tls-client-ca",
        type=Path,
        metavar="FILE",
        help="PEM of the authority that signs clients' certificates; they need one then",
    )


def add_ray_address(parser: argparse.ArgumentParser, otherwise: str = "else that of `moe-cluster serve` here") -> None:
    parser.add_argument(
        "--ray-address", default=os.environ.get("RAY_ADDRESS"), metavar="ADDRESS",
        help=f"a running Ray cluster (default: $RAY_ADDRESS, {otherwise})",
    )  # fmt: skip


def cluster_config(args: argparse.Namespace, model: str) -> ClusterConfig:
    """Returns the configuration. On a machine of its own each role gets all cores, since attention and experts take
    turns: 71.5 instead of 58.4 tokens/s over 32 streams (BENCHMARKS.md)."""
    names = {f.name for f in fields(ClusterConfig)} & vars(args).keys() - {"model"}
    given = {name: getattr(args, name) for name in names}
    cores = 1 if args.ray_address else available_cpus()
    for cpus, processes in (
        ("cpus_per_attention_replica", args.attention_replicas * args.tensor_parallel_size),
        ("cpus_per_expert_shard", args.expert_shards),
    ):
        if given[cpus] is None:
            given[cpus] = float(max(1, cores // max(1, processes)))
    if args.served_model_name:
        given["model_id"], given["model_aliases"] = args.served_model_name[0], ",".join(args.served_model_name[1:])
    for keys in ("api_keys_file", "admin_keys_file"):
        if given.get(keys):
            given[keys] = str(Path(given[keys]).resolve())
    given["speculative_config"] = with_model(given.get("speculative_config"), located)
    return ClusterConfig(model=located(model), http_api=args.http_port is not None, **given)


def serve_options(args: argparse.Namespace) -> "ServeOptions":
    from cluster.runtime.front.tls import GrpcFront
    from cluster.runtime.start.served import ServeOptions

    given = {f.name: getattr(args, f.name) for f in fields(GrpcFront) if hasattr(args, f.name)}
    return ServeOptions(
        grpc_port=args.grpc_port,
        http_port=args.http_port or 0,
        ray_address=args.ray_address,
        haproxy=args.proxy == "haproxy",
        front=GrpcFront(**given),
    )
