"""The limits of an engine and the arguments of a deployed cluster. Knows no checkpoint."""

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, Self

from cluster import inputs
from cluster.config.model import DTYPES
from cluster.errors import InvalidRequest, SetupError
from cluster.evolving import evolving

Transport = Literal["local", "auto", "stream", "ray"]
TRANSPORTS: tuple[Transport, ...] = ("auto", "stream", "ray")  # between processes
LEAST = 1e-4  # of what cannot be zero; Ray knows no smaller fraction of a CPU
LogFormat = Literal["text", "json"]
LOG_FORMATS: tuple[LogFormat, ...] = ("text", "json")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """One engine's limits.

    dtype: "auto" is the checkpoint's.  device: "auto" is CUDA where this process has one, else the CPU.
    kv_cache_bytes: memory for keys and values, in blocks of block_size tokens; None takes what memory_utilization says.
    memory_utilization: the share of what is free once the weights are loaded; by default 0.9 on a GPU, else 0.5.
    max_num_batched_tokens: tokens in one step, decode rows and prefill chunks together.
    max_model_len: prompt and output together; None is the checkpoint's context.
    max_waiting: requests that may queue before a further one is refused.
    enable_prefix_caching: prompts that begin alike share the keys and values of their beginning.
    """

    dtype: str = "auto"
    device: str = "auto"
    block_size: int = 16
    kv_cache_bytes: int | None = None
    memory_utilization: float | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_model_len: int | None = None
    max_waiting: int = 256
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        _check_choice(self, "dtype", ("auto", *DTYPES))
        _check_choice(self, "device", ("auto", "cpu", "cuda"))
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens"):
            _check_number(self, name, 1)
        _check_number(self, "max_waiting", 0)
        for name in ("kv_cache_bytes", "max_model_len"):
            if getattr(self, name) is not None:
                _check_number(self, name, 1)
        if self.memory_utilization is not None:
            _check_number(self, "memory_utilization", 0.01, 1)
        _check_switches(self)


@evolving("cluster.config.cluster")
@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """A deployed cluster: the arguments of `cluster.app:build` and of `moe-cluster serve`.

    model: the checkpoint's directory, readable on every node.
    attention_replicas, expert_shards: how many processes of each role. A dense model has no shards, whatever this says.
    max_attention_replicas: Serve adds and removes some by waiting sequences and KV use up to so many; None is never.
    min_copies: of each expert, on different shards; with 2 a lost shard costs no wait.
    redundant_experts: further copies a layer, of the experts with the highest load.
    expert_memory_bytes: of one shard, for weights; None is what min_copies and redundant_experts need.
    spare_processes: on each node with shards a started process waits for one to die (not where shards have GPUs).
    rebalance_interval_s: between two rebalances by measured load, 0 for none but by hand.
    rebalance_threshold: the imbalance (slowest shard's load over the mean) that is worth one.
    rebalance_max_moves: experts that one rebalance loads anew.
    transport: "auto" is a stream to each shard, and Ray calls while one is down; "stream" and "ray" are only one.
    gpus_per_*: GPUs a process, fractions allowed; None is one where the Ray cluster has GPUs, else none.
    cpus_per_*: Ray's logical CPUs a process.
    *_resource: a custom resource of Ray's nodes that processes of the role are kept to; "" lets them run anywhere.
    shard_timeout_s: a shard that is silent for so long counts as hung; one that computes is not silent.
    recovery_timeout_s: how long rows wait for a lost shard's successor before their request fails.
    drain_timeout_s: how long a stop waits for running requests.
    max_replays: how often a request that lost its attention replica goes on at another one, without a token in between.
    max_ongoing_requests: requests in one ingress process at a time; a further one is refused.
    max_request_bytes: a larger gRPC request is refused before it is parsed.
    max_streams_per_client: requests of one client in one ingress process at a time; 0 for no bound.
    max_waiting_inputs: medium and large ones, each, that wait in an ingress to be tokenized; then one is refused.
    max_keyless_calls: in one ingress process at a time that need no key and stay: Health.Watch.
    max_keyless_calls_per_host: of these.
    keyless_calls_per_minute: of these, new ones of one host, and calls refused for want of a key.
    max_unread_bytes: kept of a stream, in memory, that its client has not read; then the stream is ended.
    api_keys_file: clients' keys, hashed (see `moe-cluster keys new`), at this path wherever an ingress runs;
        "" asks for none.
    metrics_port: every node serves /metrics there; 0 takes a free one.
    log_format: of the log lines of all processes; "json" is one object a line.
    log_requests: a log line for each request; without, those that failed by our fault have one.
    release: any text; with another one `serve deploy` starts ingresses and attention replicas anew, as for an installed
        new version of this package, of which Serve knows nothing.
    """

    model: str
    model_id: str = ""
    dtype: str = "auto"
    device: str = "auto"
    attention_replicas: int = 1
    max_attention_replicas: int | None = None
    expert_shards: int = 2
    ingress_replicas: int = 1
    min_copies: int = 1
    redundant_experts: int = 0
    expert_memory_bytes: int | None = None
    spare_processes: bool = True
    rebalance_interval_s: float = 0.0
    rebalance_threshold: float = 1.2
    rebalance_max_moves: int = 256
    max_replays: int = 5
    transport: Transport = "auto"
    kv_cache_bytes: int | None = None
    memory_utilization: float | None = None
    block_size: int = 16
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_model_len: int | None = None
    max_waiting: int = 256
    enable_prefix_caching: bool = True
    max_ongoing_requests: int = 1024
    max_request_bytes: int = 1 << 20
    max_streams_per_client: int = 0
    max_waiting_inputs: int = 64
    max_keyless_calls: int = 256
    max_keyless_calls_per_host: int = 32
    keyless_calls_per_minute: int = 600
    max_unread_bytes: int = 4 << 20
    api_keys_file: str = ""
    gpus_per_attention_replica: float | None = None
    gpus_per_expert_shard: float | None = None
    cpus_per_attention_replica: float = 1.0
    cpus_per_expert_shard: float = 1.0
    ingress_resource: str = ""
    attention_resource: str = ""
    expert_resource: str = ""
    shard_timeout_s: float = 30.0
    recovery_timeout_s: float = 60.0
    drain_timeout_s: float = 30.0
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 9464
    log_format: LogFormat = "text"
    log_requests: bool = False
    release: str = ""

    def __post_init__(self) -> None:
        if not self.model:
            raise SetupError("model is empty: give the directory of a checkpoint")
        _check_choice(self, "transport", TRANSPORTS)
        _check_choice(self, "log_format", LOG_FORMATS)
        for name in (
            "attention_replicas",
            "ingress_replicas",
            "min_copies",
            "rebalance_threshold",
            "rebalance_max_moves",
            "max_ongoing_requests",
            "max_request_bytes",
            "max_unread_bytes",
            "max_keyless_calls",
            "max_keyless_calls_per_host",
            "keyless_calls_per_minute",
        ):
            _check_number(self, name, 1)
        for name in ("gpus_per_attention_replica", "gpus_per_expert_shard", "expert_memory_bytes"):
            if getattr(self, name) is not None:
                _check_number(self, name, 0)
        for name in ("gpus_per_attention_replica", "gpus_per_expert_shard"):
            gpus = getattr(self, name)
            if gpus and (gpus < LEAST or (gpus > 1 and gpus != int(gpus))):
                raise SetupError(
                    f"{name} is {gpus}, a part of one GPU (at least {LEAST:g}) or a whole number is needed"
                )
        for name in (
            "expert_shards",
            "recovery_timeout_s",
            "drain_timeout_s",
            "redundant_experts",
            "rebalance_interval_s",
            "max_replays",
            "max_streams_per_client",
            "max_waiting_inputs",
        ):
            _check_number(self, name, 0)
        for name in ("cpus_per_attention_replica", "cpus_per_expert_shard", "shard_timeout_s"):
            _check_number(self, name, LEAST)
        _check_number(self, "metrics_port", 0, 65535)
        if self.expert_shards and self.min_copies > self.expert_shards:
            raise SetupError(
                f"min_copies is {self.min_copies}, and {self.expert_shards} expert shards can hold "
                f"{self.expert_shards} copies of an expert at most: ask for more shards or fewer copies"
            )
        if self.max_attention_replicas is not None:
            _check_number(self, "max_attention_replicas", self.attention_replicas)
        _check_switches(self)
        self.engine()

    def engine(self) -> EngineConfig:
        """The part that one engine knows. Raises SetupError for its fields."""
        return EngineConfig(**{f.name: getattr(self, f.name) for f in fields(EngineConfig)})

    @classmethod
    def from_mapping(cls, args: Mapping[str, Any]) -> Self:
        """Reads untyped arguments (YAML, JSON). Raises SetupError for an unknown key or a value of another type."""
        known = {f.name: f for f in fields(cls)}
        hints = typing.get_type_hints(cls)
        values: dict[str, Any] = {}
        for key, value in args.items():
            if key not in known:
                raise SetupError(f"unknown argument {key!r}; known ones: {', '.join(sorted(known))}")
            values[key] = _coerce(key, value, hints[key])
        missing = [n for n, f in known.items() if f.default is MISSING and n not in values]
        if missing:
            raise SetupError(f"argument {missing[0]!r} is missing")
        return cls(**values)


def _coerce(key: str, value: Any, hint: Any) -> Any:
    """Returns `value` as `hint` (int, float, str, Literal or one of these | None), an int standing for a float."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if option is type(None):
            if value is None:
                return None
        elif typing.get_origin(option) is Literal:
            if value in typing.get_args(option):
                return value
        elif option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        elif isinstance(value, option) and isinstance(value, bool) == (option is bool):
            return value
    names = " or ".join(getattr(o, "__name__", None) or "/".join(map(str, typing.get_args(o))) for o in options)
    raise SetupError(f"{key} is {value!r}, {names.replace('NoneType', 'null')} is needed")


def _check_number(config: object, name: str, low: float, high: float = math.inf) -> None:
    """By the field's type, whole or not; leaves a plain int or float there."""
    hint = type(config).__annotations__[name]
    plain_number = inputs.number if float in (hint, *typing.get_args(hint)) else inputs.whole_number
    try:
        value = plain_number(getattr(config, name), name)
    except InvalidRequest as error:
        raise SetupError(str(error)) from None
    if not low <= value <= high or math.isinf(value):
        upper = "" if high == math.inf else f" and at most {high:g}"
        raise SetupError(f"{name} is {inputs.shown(value)}, at least {low:g}{upper} is needed")
    object.__setattr__(config, name, value)


def _check_switches(config: Any) -> None:
    for f in fields(config):
        if f.type is bool and not isinstance(getattr(config, f.name), bool):
            raise SetupError(f"{f.name} is {inputs.shown(getattr(config, f.name))}, true or false is needed")


def _check_choice(config: object, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(config, name)
    if value not in choices:
        raise SetupError(f"{name} is {inputs.shown(value)}, one of {', '.join(choices)} is needed")
