"""A checkpoint's config.json, normalized. Knows no model family, no tensors, and reads no files."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.config.json_keys import shown
from cluster.config.kv_cache import EIGHT_BITS, SCALE_BYTES
from cluster.config.quantization import PLAIN, QUANTIZATIONS, Quantization
from cluster.config.rope import RopeConfig
from cluster.errors import CheckpointError
from cluster.outcome import Head

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
DTYPE_ALIASES = {"half": "float16", "float": "float32", "double": "float64"}  # torch's own other names
DTYPES = ("float32", "bfloat16", "float16")  # to compute in; float64 is read from disk alone
# Forty times what released models have. More is a typing error, and would fill the memory with names.
MAX_LAYERS = 1024
MAX_EXPERTS = 65_536  # of all layers together


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    """Routed experts. sparse_layers: the ids of the layers that have them, ascending.

    norm_topk_prob: whether the weights of a token's experts are scaled to a sum of one.
    """

    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    sparse_layers: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_counts(
            self, "num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"
        )
        if self.num_experts_per_tok > self.num_experts:
            raise CheckpointError(
                f"config.json: num_experts_per_tok ({self.num_experts_per_tok}) is more than num_experts "
                f"({self.num_experts})"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGroup:
    """Layers whose tokens see equally far. window: as of `ModelConfig.window`.  layer_ids: ascending."""

    window: int | None
    layer_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder as its checkpoint describes it, whichever family and key style; `read_model_config` makes one.

    model_type: the family's name, by which the registries find its code.
    layer_types: "full_attention" or "sliding_attention" for each layer.
    dtype: of the tensors on disk, as the config says it, a key of DTYPE_BYTES.
    moe: None for a model whose layers are all dense.  head: the layer above the decoder.
    stored: how the checkpoint has its linear layers rounded; None for plain ones.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope: RopeConfig
    qkv_bias: bool
    sliding_window: int | None
    layer_types: tuple[str, ...]
    tie_word_embeddings: bool
    max_position_embeddings: int
    dtype: str
    eos_token_ids: tuple[int, ...]
    moe: MoeConfig | None = None
    head: Head = field(default_factory=Head)
    stored: Quantization | None = None

    def __post_init__(self) -> None:
        _check_counts(
            self, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "intermediate_size", "max_position_embeddings",
        )  # fmt: skip
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"config.json: num_attention_heads ({self.num_attention_heads}) is not a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise CheckpointError(f"config.json: head_dim is {self.head_dim}, rotary embedding needs an even one")
        self.rope.check(self.head_dim)
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

    @property
    def num_experts(self) -> int:
        """Routed experts of a sparse layer; 0 for a dense model."""
        return 0 if self.moe is None else self.moe.num_experts

    @property
    def num_experts_per_tok(self) -> int:
        return 0 if self.moe is None else self.moe.num_experts_per_tok

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """The layers with routed experts."""
        return () if self.moe is None else self.moe.sparse_layers

    @property
    def stored_experts(self) -> Quantization | None:
        """As `stored`, of the routed experts."""
        return self.stored if self.stored is not None and self.stored.experts else None

    def is_sparse(self, layer_id: int) -> bool:
        """Whether a layer has routed experts (else a dense SwiGLU of `intermediate_size`)."""
        return layer_id in self.sparse_layers

    @property
    def context_length(self) -> int:
        """The longest prompt and output together, scaling of positions included."""
        return self.rope.context_length(self.max_position_embeddings)

    def window(self, layer_id: int) -> int | None:
        """The sliding window of a layer in tokens (a token sees itself and window − 1 before it), None for all."""
        return self.sliding_window if self.layer_types[layer_id] == "sliding_attention" else None

    @property
    def layer_groups(self) -> tuple[LayerGroup, ...]:
        """All layers by their windows, those that see everything first."""
        windows = [self.window(layer_id) for layer_id in range(self.num_hidden_layers)]
        return tuple(
            LayerGroup(window=window, layer_ids=tuple(i for i, of_layer in enumerate(windows) if of_layer == window))
            for window in sorted(set(windows), key=lambda window: -1 if window is None else window)
        )

    def expert_bytes(self, dtype: str, quantization: str = PLAIN) -> int:
        """Bytes of one routed expert's three matrices; 0 for a dense model."""
        if self.moe is None:
            return 0
        hidden, intermediate = self.hidden_size, self.moe.moe_intermediate_size
        rounded = self.stored_experts or QUANTIZATIONS.get(quantization)
        if rounded is None:
            return 3 * hidden * intermediate * DTYPE_BYTES[dtype]
        return 2 * rounded.matrix_bytes(intermediate, hidden) + rounded.matrix_bytes(hidden, intermediate)

    def kv_bytes_per_token(self, dtype: str, num_layers: int | None = None) -> int:
        """Bytes that one token's keys and values take over so many layers, by default over all.

        dtype: of the cache, a key of DTYPE_BYTES or one of EIGHT_BITS.
        """
        layers = self.num_hidden_layers if num_layers is None else num_layers
        row_bytes = self.head_dim + SCALE_BYTES if dtype in EIGHT_BITS else self.head_dim * DTYPE_BYTES[dtype]
        return 2 * layers * self.num_key_value_heads * row_bytes


def given_dtype(raw: Mapping[str, Any]) -> Any:
    """The dtype that a config.json gives its tensors; None where it leaves that to them."""
    return raw.get("dtype") or raw.get("torch_dtype")


def _check_counts(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value < 1:
            raise CheckpointError(f"config.json: {name} is {value}, a whole number from 1 is needed")
