"""A checkpoint's config.json, normalized. Knows no tensors and reads no files."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from cluster.errors import CheckpointError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DTYPES = tuple(DTYPE_BYTES)


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
