"""Configuration: the checkpoint's (`ModelConfig`), the engine's and the cluster's. Knows no tensors and reads no files.

All three are frozen; derive a changed one with `dataclasses.replace`. Their `__post_init__` raises SetupError (the
model's: CheckpointError) with the field, the value and the limit.
"""

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, Self

from cluster.errors import CheckpointError, SetupError

DTYPES = ("float32", "bfloat16", "float16")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
Transport = Literal["local", "ray"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding. `rope_type` is "default", "linear" or "yarn"; the fields below `factor` are YaRN's."""

    theta: float
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A `qwen2_moe` config.json, both key styles (`rope_theta` + `rope_scaling`, or `rope_parameters`), normalized.

    layer_types: "full_attention" or "sliding_attention" for each layer.  dtype: of the tensors on disk.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    decoder_sparse_step: int
    mlp_only_layers: tuple[int, ...]
    rms_norm_eps: float
    rope: RopeConfig
    qkv_bias: bool
    sliding_window: int | None
    layer_types: tuple[str, ...]
    tie_word_embeddings: bool
    max_position_embeddings: int
    dtype: str
    eos_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size",
            "num_experts", "num_experts_per_tok", "decoder_sparse_step", "max_position_embeddings",
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise CheckpointError(f"config.json: {name} is {value!r}, a whole number from 1 is needed")
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"config.json: num_attention_heads ({self.num_attention_heads}) is not a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise CheckpointError(f"config.json: head_dim is {self.head_dim}, rotary embedding needs an even one")
        if self.num_experts_per_tok > self.num_experts:
            raise CheckpointError(
                f"config.json: num_experts_per_tok ({self.num_experts_per_tok}) is more than num_experts "
                f"({self.num_experts})"
            )
        if len(self.layer_types) != self.num_hidden_layers:
            raise CheckpointError(
                f"config.json: layer_types has {len(self.layer_types)} entries for {self.num_hidden_layers} layers"
            )
        if self.dtype not in DTYPES:
            raise CheckpointError(f"config.json: dtype is {self.dtype!r}, one of {', '.join(DTYPES)} is needed")

    def is_sparse(self, layer_id: int) -> bool:
        """Whether a layer has routed experts (else a dense SwiGLU of `intermediate_size`)."""
        return layer_id not in self.mlp_only_layers and (layer_id + 1) % self.decoder_sparse_step == 0

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.num_hidden_layers) if self.is_sparse(i))

    def window(self, layer_id: int) -> int | None:
        """The sliding window of a layer in tokens (a token sees itself and window − 1 before it), None for all."""
        return self.sliding_window if self.layer_types[layer_id] == "sliding_attention" else None

    def expert_bytes(self, dtype: str) -> int:
        """Bytes of one routed expert's three matrices."""
        return 3 * self.hidden_size * self.moe_intermediate_size * DTYPE_BYTES[dtype]

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes that one token's keys and values take over all layers."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * DTYPE_BYTES[dtype]

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Reads a parsed config.json. Raises CheckpointError that names the key, its value and what is needed."""
        model_type = raw.get("model_type")
        if model_type != "qwen2_moe":
            raise CheckpointError(f"config.json: model_type is {model_type!r}, only 'qwen2_moe' is served")
        if raw.get("quantization_config"):
            raise CheckpointError(
                "config.json has a quantization_config, quantized checkpoints are not served yet: use the bfloat16 one"
            )
        if raw.get("hidden_act", "silu") != "silu":
            raise CheckpointError(f"config.json: hidden_act is {raw['hidden_act']!r}, only 'silu' is served")
        keys = _Keys(raw, "config.json")
        num_layers, num_heads = keys.count("num_hidden_layers"), keys.count("num_attention_heads")
        hidden_size = keys.count("hidden_size")
        sliding_window = keys.count("sliding_window", 4096) if keys.flag("use_sliding_window", False) else None
        dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
        return cls(
            vocab_size=keys.count("vocab_size"),
            hidden_size=hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=keys.count("num_key_value_heads", num_heads),
            head_dim=keys.count("head_dim", hidden_size // num_heads),
            intermediate_size=keys.count("intermediate_size"),
            moe_intermediate_size=keys.count("moe_intermediate_size"),
            shared_expert_intermediate_size=keys.count("shared_expert_intermediate_size"),
            num_experts=keys.count("num_experts"),
            num_experts_per_tok=keys.count("num_experts_per_tok"),
            norm_topk_prob=keys.flag("norm_topk_prob", False),
            decoder_sparse_step=keys.count("decoder_sparse_step", 1),
            mlp_only_layers=keys.ids("mlp_only_layers"),
            rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
            rope=_rope(raw, keys.count("max_position_embeddings")),
            qkv_bias=keys.flag("qkv_bias", True),
            sliding_window=sliding_window,
            layer_types=_layer_types(keys, num_layers, sliding_window),
            tie_word_embeddings=keys.flag("tie_word_embeddings", False),
            max_position_embeddings=keys.count("max_position_embeddings"),
            dtype=dtype,
            eos_token_ids=keys.ids("eos_token_id"),
        )


@dataclass(frozen=True, slots=True)
class _Keys:
    """Typed access to a JSON object; a null counts as missing. Raises CheckpointError for the key."""

    raw: Mapping[str, Any]
    where: str

    def count(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._wrong(key, "a whole number from 1")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self._wrong(key, "a number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def ids(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers from 0, or one of them; missing is none."""
        value = self._get(key, [])
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in values):
            raise self._wrong(key, "a list of whole numbers from 0")
        return tuple(values)

    def _get(self, key: str, default: Any) -> Any:
        value = self.raw.get(key)
        if value is not None:
            return value
        if default is None:
            raise CheckpointError(f"{self.where}: {key} is missing")
        return default

    def _wrong(self, key: str, needed: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {key} is {self.raw[key]!r}, {needed} is needed")


def _layer_types(keys: _Keys, num_layers: int, sliding_window: int | None) -> tuple[str, ...]:
    """`layer_types` if the config has it; else qwen2_moe's own rule. Raises CheckpointError.

    Source: transformers 5.23 Qwen2MoeConfig: with the window on, even layers below `max_window_layers` slide
    (dense qwen2 has another rule).
    """
    given = keys.raw.get("layer_types")
    if not given:
        last = keys.count("max_window_layers", 28) if sliding_window is not None else 0
        return tuple("sliding_attention" if i % 2 == 0 and i < last else "full_attention" for i in range(num_layers))
    kinds = {"full_attention", "sliding_attention"}
    if not isinstance(given, list) or not all(isinstance(kind, str) and kind in kinds for kind in given):
        raise CheckpointError(
            f"config.json: layer_types is {given!r}, a list of {' and '.join(sorted(kinds))} is needed"
        )
    if "sliding_attention" in given and sliding_window is None:
        raise CheckpointError(
            "config.json: layer_types has sliding_attention, but use_sliding_window and sliding_window do not set one"
        )
    return tuple(given)


def _rope(raw: Mapping[str, Any], max_position_embeddings: int) -> RopeConfig:
    """Merges `rope_parameters` (new) or `rope_theta` + `rope_scaling` (old). Raises CheckpointError."""
    scaling, parameters = raw.get("rope_scaling") or {}, raw.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping) or not isinstance(parameters, Mapping):
        raise CheckpointError("config.json: rope_scaling and rope_parameters must be objects")
    merged = {"rope_theta": raw.get("rope_theta"), **scaling, **parameters}
    rope_type = merged.get("rope_type", merged.get("type", "default"))
    if rope_type not in ("default", "linear", "yarn"):
        raise CheckpointError(f"config.json: rope type {rope_type!r} is not served: default, linear and yarn are")
    keys = _Keys(merged, "config.json, rope")
    theta = keys.number("rope_theta", 10000.0)
    if theta <= 1:
        raise CheckpointError(f"config.json: rope_theta is {theta}, a number above 1 is needed")
    optional: dict[str, Any] = {
        key: keys.number(key)
        for key in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
        if merged.get(key) is not None
    }
    return RopeConfig(
        theta=theta,
        rope_type=rope_type,
        factor=keys.number("factor", 1.0) if rope_type != "default" else 1.0,
        original_max_position_embeddings=keys.count("original_max_position_embeddings", max_position_embeddings),
        truncate=keys.flag("truncate", True),
        **optional,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """One engine's limits.

    dtype: "auto" is the checkpoint's.  device: "auto" is CUDA where this process has one, else the CPU.
    kv_cache_bytes: memory for keys and values; with block_size tokens a block it fixes the number of blocks.
    max_num_batched_tokens: tokens in one step, decode rows and prefill chunks together.
    max_model_len: prompt and output together; None is the checkpoint's max_position_embeddings.
    max_waiting: requests that may queue before a further one is refused.
    """

    dtype: str = "auto"
    device: str = "auto"
    block_size: int = 16
    kv_cache_bytes: int = 1 << 30
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_model_len: int | None = None
    max_waiting: int = 256

    def __post_init__(self) -> None:
        _check_choice(self, "dtype", ("auto", *DTYPES))
        _check_choice(self, "device", ("auto", "cpu", "cuda"))
        for name in ("block_size", "kv_cache_bytes", "max_num_seqs", "max_num_batched_tokens"):
            _check_number(self, name, 1)
        _check_number(self, "max_waiting", 0)
        if self.max_model_len is not None:
            _check_number(self, "max_model_len", 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """A deployed cluster: the arguments of `cluster.app:build` and of `moe-cluster serve`.

    model: the checkpoint's directory, readable on every node.
    attention_replicas, expert_shards: how many processes of each role.
    gpus_per_*: GPUs a process, fractions allowed; None is one where the Ray cluster has GPUs, else none.
    cpus_per_*: Ray's logical CPUs a process.
    shard_timeout_s: a shard that does not answer one call in this time counts as hung.
    recovery_timeout_s: how long rows wait for a lost shard's successor before their request fails.
    drain_timeout_s: how long a stop waits for running requests.
    max_ongoing_requests: requests in one ingress process at a time.
    max_request_bytes: a larger gRPC request is refused before it is parsed.
    metrics_port: every node serves /metrics there; 0 takes a free one.
    """

    model: str
    model_id: str = ""
    dtype: str = "auto"
    device: str = "auto"
    attention_replicas: int = 1
    expert_shards: int = 2
    ingress_replicas: int = 1
    transport: Transport = "ray"
    kv_cache_bytes: int = 1 << 30
    block_size: int = 16
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_model_len: int | None = None
    max_waiting: int = 256
    max_ongoing_requests: int = 512
    max_request_bytes: int = 1 << 20
    gpus_per_attention_replica: float | None = None
    gpus_per_expert_shard: float | None = None
    cpus_per_attention_replica: float = 1.0
    cpus_per_expert_shard: float = 1.0
    shard_timeout_s: float = 30.0
    recovery_timeout_s: float = 60.0
    drain_timeout_s: float = 30.0
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 9464

    def __post_init__(self) -> None:
        if not self.model:
            raise SetupError("model is empty: give the directory of a qwen2_moe checkpoint")
        _check_choice(self, "transport", ("ray",))
        for name in (
            "attention_replicas",
            "expert_shards",
            "ingress_replicas",
            "max_ongoing_requests",
            "max_request_bytes",
        ):
            _check_number(self, name, 1)
        for name in ("gpus_per_attention_replica", "gpus_per_expert_shard"):
            if getattr(self, name) is not None:
                _check_number(self, name, 0)
        for name in (
            "cpus_per_attention_replica",
            "cpus_per_expert_shard",
            "shard_timeout_s",
            "recovery_timeout_s",
            "drain_timeout_s",
        ):
            _check_number(self, name, 0)
        _check_number(self, "metrics_port", 0, 65535)
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
        elif isinstance(value, option) and not isinstance(value, bool):
            return value
    names = " or ".join(getattr(o, "__name__", None) or "/".join(map(str, typing.get_args(o))) for o in options)
    raise SetupError(f"{key} is {value!r}, {names.replace('NoneType', 'null')} is needed")


def _check_number(config: object, name: str, low: float, high: float = math.inf) -> None:
    value = getattr(config, name)
    if not low <= value <= high:
        upper = "" if high == math.inf else f" and at most {high:g}"
        raise SetupError(f"{name} is {value}, at least {low:g}{upper} is needed")


def _check_choice(config: object, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(config, name)
    if value not in choices:
        raise SetupError(f"{name} is {value!r}, one of {', '.join(choices)} is needed")
