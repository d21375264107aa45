"""The arguments of a deployed cluster. Knows no checkpoint."""

import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, Self

from cluster.config.engine import EngineConfig
from cluster.config.kv_cache import check_cache_device
from cluster.config.lora import check_adapters
from cluster.config.options import (
    MOST_BYTES,
    MOST_CALLS,
    MOST_MESSAGE_BYTES,
    check,
    defaults_of,
    option,
    required,
    typed,
)
from cluster.config.tracing import TracingConfig
from cluster.errors import SetupError
from cluster.evolving import evolving

Transport = Literal["local", "auto", "stream", "ray"]
TRANSPORTS: tuple[Transport, ...] = ("auto", "stream", "ray")  # between processes
LEAST = 1e-4  # of what cannot be zero; Ray knows no smaller fraction of a CPU
MOST_S = 1e9  # 31 years; Python's waits take 292 years at most
MOST_REPLICAS = 10_000  # far beyond what a Ray cluster runs
MOST_CPUS = 8192  # that Linux knows in one machine (NR_CPUS)
MOST_GPUS = 1024  # in one machine
Balancer = Literal["prefix", "load"]
BALANCERS: tuple[Balancer, ...] = ("prefix", "load")
LogFormat = Literal["text", "json"]
LOG_FORMATS: tuple[LogFormat, ...] = ("text", "json")

_GPUS = "GPUs of one process, fractions allowed; unset: 1 where Ray has any, else 0"
_CPUS = "Ray's CPUs for one process, and its threads where it computes on the CPU"
_RESOURCE = "custom resource of Ray's nodes on which {} run; empty: on any node"


@evolving("cluster.config.cluster")
@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig(TracingConfig):
    """A deployed cluster: the arguments of `cluster.app:build` and of `moe-cluster serve`, with those of its engines.

    Raises SetupError for values that cannot work.
    """

    model: str = required(
        "the checkpoint's directory, at the same path on every node; or its name on Hugging Face's hub, OWNER/NAME or "
        "OWNER/NAME@REVISION, and each node downloads the files that it needs; or demo, the tiny one inside the package"
    )
    model_id: str = option(
        "", "the name that clients see; empty: the directory's, or its name on the hub without a revision"
    )
    model_aliases: str = option(
        "", "further names by which clients may ask for the model, separated by commas; answers have its first name"
    )
    skip_tokenizer: bool = option(
        False,
        "serves token ids alone, for a checkpoint without a tokenizer: texts, chats and stop strings are refused",
    )
    attention_replicas: int = option(1, "processes with the dense weights and a KV cache", least=1, most=MOST_REPLICAS)
    max_attention_replicas: int | None = option(
        None,
        "Serve adds and removes attention replicas up to so many, by waiting sequences and use of the KV caches; "
        "unset: it does not",
        least=1,
        most=MOST_REPLICAS,
    )
    expert_shards: int = option(
        2, "processes that share the routed experts; a dense model has none", least=0, most=MOST_REPLICAS
    )
    ingress_replicas: int = option(
        2,
        "processes that tokenize, validate and stream; with 2 one that dies leaves no gap",
        least=1,
        most=MOST_REPLICAS,
    )
    balancer: Balancer = option(
        "prefix",
        "chooses a request's attention replica: prefix, one that has the beginning of its prompt in the cache, unless "
        "that one is too busy; or load, one with fewer requests",
        choices=BALANCERS,
    )
    min_copies: int = option(
        1, "copies of each expert, on different shards; with 2 a lost shard costs no wait", least=1, most=MOST_REPLICAS
    )
    redundant_experts: int = option(0, "further copies in each layer, of the busiest experts", least=0, most=MOST_CALLS)
    expert_memory_bytes: int | None = option(
        None,
        "memory for the weights of one shard; unset: what min_copies and redundant_experts need",
        least=0,
        most=MOST_BYTES,
    )
    spare_processes: bool = option(
        True,
        "on each node with shards a started process waits to take the place of one that dies; not where shards have "
        "GPUs",
    )
    rebalance_interval_s: float = option(
        0.0,
        "seconds between two rebalances by measured load; 0: only `moe-cluster rebalance` rebalances",
        least=0,
        most=MOST_S,
    )
    rebalance_threshold: float = option(
        1.2,
        "imbalance (the slowest shard's load over the mean) from which on a rebalance is worth it",
        least=1,
        most=MOST_REPLICAS,
    )
    rebalance_max_moves: int = option(256, "experts that one rebalance loads anew at most", least=1, most=MOST_CALLS)
    max_replays: int = option(
        5,
        "times that a request goes on at another attention replica without a new token in between",
        least=0,
        most=MOST_CALLS,
    )
    transport: Transport = option(
        "auto",
        "what carries batches to the shards: stream, ray, or auto: streams, and Ray calls while one is down",
        choices=TRANSPORTS,
    )
    http_api: bool = option(
        True, "answers OpenAI's API over HTTP, on Serve's HTTP port, beside gRPC; false: gRPC alone"
    )
    stored_responses: int = option(
        10_000,
        "answers of /v1/responses that are kept, the oldest goes for a new one; 0: none is kept",
        least=0,
        most=MOST_CALLS,
    )
    stored_responses_bytes: int = option(
        256 << 20, "bytes of kept responses, in one process for all", least=1 << 20, most=MOST_BYTES
    )
    stored_responses_age_s: float = option(86_400.0, "seconds that a response is kept", least=1, most=MOST_S)
    max_ongoing_requests: int = option(
        1024,
        "requests in one ingress process at a time, a further one gets RESOURCE_EXHAUSTED",
        least=1,
        most=MOST_CALLS,
    )
    max_request_bytes: int = option(1 << 20, "a larger request gets INVALID_ARGUMENT", least=1, most=MOST_MESSAGE_BYTES)
    max_streams_per_client: int = option(
        0, "requests of one client in one ingress process at a time; 0: any number", least=0, most=MOST_CALLS
    )
    max_waiting_inputs: int = option(
        64,
        "texts, chats and token ids that wait in an ingress process to be tokenized or made text, those from 2,048 and "
        "those from 32,768 characters each; a further one gets RESOURCE_EXHAUSTED",
        least=0,
        most=MOST_CALLS,
    )
    max_keyless_calls: int = option(
        256,
        "calls in one ingress process at a time that need no key and stay open: Health.Watch",
        least=1,
        most=MOST_CALLS,
    )
    max_keyless_calls_per_host: int = option(32, "of these calls, those from one host", least=1, most=MOST_CALLS)
    keyless_calls_per_minute: int = option(
        600,
        "new calls of these from one host, and its calls refused for want of a key, in a minute",
        least=1,
        most=MOST_CALLS,
    )
    max_unread_bytes: int = option(
        4 << 20,
        "memory for the part of a stream that its client has not read; beyond it the stream ends with "
        "RESOURCE_EXHAUSTED",
        least=1,
        most=MOST_BYTES,
    )
    api_keys_file: str = option(
        "",
        "file of the clients' hashed keys (`moe-cluster keys new`), at the same path wherever an ingress runs; empty: "
        "clients need no key",
    )
    admin_keys_file: str = option(
        "",
        "file of hashed keys that also allow changes from the live page: kill a shard, rebalance, scale; empty: nobody "
        "may",
    )
    max_watchers: int = option(
        64, "people at a time who follow the live page at one ingress; 0: there is no page", least=0, most=MOST_CALLS
    )
    gpus_per_attention_replica: float | None = option(None, _GPUS, least=0, most=MOST_GPUS)
    gpus_per_expert_shard: float | None = option(None, _GPUS, least=0, most=MOST_GPUS)
    cpus_per_attention_replica: float = option(1.0, _CPUS, least=LEAST, most=MOST_CPUS)
    cpus_per_expert_shard: float = option(1.0, _CPUS, least=LEAST, most=MOST_CPUS)
    ingress_resource: str = option("", _RESOURCE.format("ingresses and the controller"))
    attention_resource: str = option("", _RESOURCE.format("attention replicas"))
    expert_resource: str = option("", _RESOURCE.format("expert shards"))
    shard_timeout_s: float = option(
        30.0,
        "seconds of silence after which a shard counts as lost; one that computes is not silent, however long it takes",
        least=LEAST,
        most=MOST_S,
    )
    recovery_timeout_s: float = option(
        60.0,
        "seconds that requests wait for a lost shard's successor; longer than a shard takes to start and to load",
        least=0,
        most=MOST_S,
    )
    drain_timeout_s: float = option(30.0, "seconds that a stop waits for running requests", least=0, most=MOST_S)
    max_surge_percent: int = option(
        0,
        "attention replicas that a rollout may start beside the old ones, in percent of their number, rounded up; 0 "
        "ends an old one before its successor starts, so that no GPU has to be free",
        least=0,
        most=100,
    )
    rolling_update_percentage: float = option(
        0.2,
        "attention replicas that a rollout replaces at a time, as a fraction of their number: at least one",
        least=LEAST,
        most=1,
    )
    metrics_host: str = option("127.0.0.1", "address on which each node serves /metrics")
    metrics_port: int = option(9464, "port of /metrics on each node; 0: a free one", least=0, most=65535)
    log_format: LogFormat = option(
        "text", "of all processes' log lines: text, or json: one object a line", choices=LOG_FORMATS
    )
    log_requests: bool = option(
        False, "a log line for each request; without it, only for those that failed by the server's fault"
    )
    release: str = option(
        "",
        "any text; another one makes `serve deploy` start ingresses and attention replicas anew, as after a new "
        "version of this package was installed",
    )

    def __post_init__(self) -> None:
        if not self.model:
            raise SetupError("model is empty: give the directory of a checkpoint, or its name on the hub")
        check(self)
        check_adapters(self.lora_adapters, self.max_loras)
        self.check_speculation()
        self.check_tracing()
        for name in ("gpus_per_attention_replica", "gpus_per_expert_shard"):
            gpus = getattr(self, name)
            if gpus and (gpus < LEAST or (gpus > 1 and gpus != int(gpus))):
                raise SetupError(
                    f"{name} is {gpus}, a part of one GPU (at least {LEAST:g}) or a whole number is needed"
                )
        on_gpu = self.device == "cuda" or (self.device == "auto" and self.gpus_per_attention_replica)
        check_cache_device(self.kv_cache_dtype, "cuda" if on_gpu else self.device)
        if self.expert_shards and self.min_copies > self.expert_shards:
            raise SetupError(
                f"min_copies is {self.min_copies}, and {self.expert_shards} expert shards can hold "
                f"{self.expert_shards} copies of an expert at most: ask for more shards or fewer copies"
            )
        most, replicas = self.max_attention_replicas, self.attention_replicas
        if most is not None and most < replicas:
            raise SetupError(f"max_attention_replicas is {most}, at least {replicas} is needed")

    @property
    def aliases(self) -> tuple[str, ...]:
        """Returns the model's further names."""
        return tuple(name for text in self.model_aliases.split(",") if (name := text.strip()))

    def engine(self) -> EngineConfig:
        """Returns the part that one engine knows."""
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
            values[key] = typed(key, value, hints[key])
        missing = [n for n, f in known.items() if f.default is MISSING and n not in values]
        if missing:
            raise SetupError(f"argument {missing[0]!r} is missing")
        return cls(**values)


DEFAULTS = defaults_of(ClusterConfig)  # of an engine's fields too, by name
