"""A checkpoint's config.json, normalized. Knows no tensors and reads no files."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from cluster.config.json_keys import Keys, shown
from cluster.config.rope import RopeConfig, read_rope
from cluster.errors import CheckpointError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
DTYPE_ALIASES = {"half": "float16", "float": "float32", "double": "float64"}  # torch's own other names
DTYPES = ("float32", "bfloat16", "float16")  # to compute in; float64 is read from disk alone
# Forty times what released models have. More is a typing error, and would fill the memory with names.
MAX_LAYERS = 1024
MAX_EXPERTS = 65_536  # of all layers together


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A `qwen2_moe` config.json, both key styles (`rope_theta` + `rope_scaling`, or `rope_parameters`), normalized.

    layer_types: "full_attention" or "sliding_attention" for each layer.  dtype: of the tensors on disk, as the config
    says it, a key of DTYPE_BYTES.
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
            if value < 1:
                raise CheckpointError(f"config.json: {name} is {value}, a whole number from 1 is needed")
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
        if self.num_experts * self.num_hidden_layers > MAX_EXPERTS:
            raise CheckpointError(
                f"config.json: num_experts is {self.num_experts} in {self.num_hidden_layers} layers, {MAX_EXPERTS:,} "
                "experts are served at most"
            )
        if len(self.layer_types) != self.num_hidden_layers:
            raise CheckpointError(
                f"config.json: layer_types has {len(self.layer_types)} entries for {self.num_hidden_layers} layers"
            )
        if self.dtype not in DTYPE_BYTES:
            raise CheckpointError(
                f"config.json: dtype is {shown(self.dtype)}, one of {', '.join(DTYPE_BYTES)} is needed"
            )

    def is_sparse(self, layer_id: int) -> bool:
        """Whether a layer has routed experts (else a dense SwiGLU of `intermediate_size`)."""
        return layer_id not in self.mlp_only_layers and (layer_id + 1) % self.decoder_sparse_step == 0

    @property
    def context_length(self) -> int:
        """The longest prompt and output together, scaling of positions included."""
        return self.rope.context_length(self.max_position_embeddings)

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
            raise CheckpointError(f"config.json: model_type is {shown(model_type)}, only 'qwen2_moe' is served")
        if raw.get("quantization_config"):
            raise CheckpointError(
                "config.json has a quantization_config, quantized checkpoints are not served yet: use the bfloat16 one"
            )
        if raw.get("hidden_act") not in (None, "silu"):
            raise CheckpointError(f"config.json: hidden_act is {shown(raw['hidden_act'])}, only 'silu' is served")
        keys = Keys(raw, "config.json")
        num_layers, num_heads = keys.count("num_hidden_layers", at_most=MAX_LAYERS), keys.count("num_attention_heads")
        hidden_size = keys.count("hidden_size")
        sliding_window = keys.count("sliding_window", 4096) if keys.flag("use_sliding_window", False) else None
        dtype = str(given_dtype(raw) or "float32").removeprefix("torch.")
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
            mlp_only_layers=tuple(sorted({i for i in keys.ids("mlp_only_layers") if i < num_layers})),
            rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
            rope=read_rope(raw, keys.count("max_position_embeddings")),
            qkv_bias=keys.flag("qkv_bias", True),
            sliding_window=sliding_window,
            layer_types=_layer_types(keys, num_layers, sliding_window),
            tie_word_embeddings=keys.flag("tie_word_embeddings", False),
            max_position_embeddings=keys.count("max_position_embeddings"),
            dtype=DTYPE_ALIASES.get(dtype, dtype),
            eos_token_ids=keys.ids("eos_token_id"),
        )


def given_dtype(raw: Mapping[str, Any]) -> Any:
    """What a config.json says of its tensors' dtype; None where it leaves that to them."""
    return raw.get("dtype") or raw.get("torch_dtype")


def _layer_types(keys: Keys, num_layers: int, sliding_window: int | None) -> tuple[str, ...]:
    """`layer_types` if the config has it; else qwen2_moe's own rule. Raises CheckpointError.

    Source: transformers 5.23 Qwen2MoeConfig: with the window on, even layers below `max_window_layers` slide
    (dense qwen2 has another rule).
    """
    given = keys.raw.get("layer_types")
    if not given:
        last = keys.count("max_window_layers", 28, at_least=0) if sliding_window is not None else 0
        return tuple("sliding_attention" if i % 2 == 0 and i < last else "full_attention" for i in range(num_layers))
    kinds = {"full_attention", "sliding_attention"}
    if not isinstance(given, list) or not all(isinstance(kind, str) and kind in kinds for kind in given):
        raise CheckpointError(
            f"config.json: layer_types is {shown(given)}, a list of {' and '.join(sorted(kinds))} is needed"
        )
    if "sliding_attention" in given and sliding_window is None:
        raise CheckpointError(
            "config.json: layer_types has sliding_attention, but use_sliding_window and sliding_window do not set one"
        )
    return tuple(given)
