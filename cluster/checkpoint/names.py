"""Which tensors a `ModelConfig` implies, by name and shape. Knows no files and no tensors.

Names are those of the released checkpoints: experts lie there one by one. transformers 5 can also write a layer's
experts fused; `stored_shapes` and `find_source` know of that, and of embeddings that are stored as the head alone.
H hidden, V vocabulary, E experts, I a SwiGLU's inner size.
"""

import math
import re
from collections.abc import Collection
from dataclasses import dataclass

from cluster.config import DTYPE_BYTES, ModelConfig

Shapes = dict[str, tuple[int, ...]]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Old exports store these beside the weights. They are computed from the config: dropping them changes nothing.
HARMLESS = (
    re.compile(r"(model\.layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"),
    re.compile(r"model\.rotary_emb\.(original_)?inv_freq"),
    re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.(cos|sin)_cached"),
    re.compile(r"model\.(embeddings\.)?position_ids"),
)
_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a tensor lies: the stored tensor's name, and of a fused one its expert, and which half of [2I, H]."""

    name: str
    expert_id: int | None = None
    half: int | None = None


def dense_shapes(config: ModelConfig) -> Shapes:
    """Everything that an attention replica holds: all but the routed experts, in the model's order."""
    shapes: Shapes = {EMBEDDING: (config.vocab_size, config.hidden_size)}  # [V, H]
    for layer_id in range(config.num_hidden_layers):
        shapes |= _layer_shapes(config, layer_id)
    return shapes | _head_shapes(config)


def expert_shapes(config: ModelConfig, layer_id: int, expert_id: int) -> Shapes:
    """The three matrices of one routed expert."""
    assert config.is_sparse(layer_id), f"layer {layer_id} has no experts"
    assert 0 <= expert_id < config.num_experts, f"there is no expert {expert_id}"
    prefix = f"model.layers.{layer_id}.mlp.experts.{expert_id}"
    return _swiglu_shapes(prefix, config.hidden_size, config.moe_intermediate_size)


def checkpoint_shapes(config: ModelConfig) -> Shapes:
    """Every tensor of the checkpoint, in the order of released files: a layer's experts follow its others."""
    shapes: Shapes = {EMBEDDING: (config.vocab_size, config.hidden_size)}  # [V, H]
    for layer_id in range(config.num_hidden_layers):
        shapes |= _layer_shapes(config, layer_id)
        if config.is_sparse(layer_id):
            for expert_id in range(config.num_experts):
                shapes |= expert_shapes(config, layer_id, expert_id)
    return shapes | _head_shapes(config)


def stored_shapes(config: ModelConfig, stored: Collection[str]) -> Shapes:
    """As `checkpoint_shapes`, with the names that a checkpoint which stores `stored` has for them."""
    shapes = checkpoint_shapes(config)
    for layer_id in config.sparse_layers:
        prefix = f"model.layers.{layer_id}.mlp.experts"
        inner, hidden = config.moe_intermediate_size, config.hidden_size
        for fused, shape, parts in (
            ("gate_up_proj", (config.num_experts, 2 * inner, hidden), ("gate_proj", "up_proj")),
            ("down_proj", (config.num_experts, hidden, inner), ("down_proj",)),
        ):
            if f"{prefix}.{fused}" in stored:
                for expert_id in range(config.num_experts):
                    for part in parts:
                        del shapes[f"{prefix}.{expert_id}.{part}.weight"]
                shapes[f"{prefix}.{fused}"] = shape
    if config.tie_word_embeddings and HEAD in stored:
        shapes[HEAD] = shapes.pop(EMBEDDING)
    return shapes


def find_source(name: str, stored: Collection[str], *, tied: bool) -> Source | None:
    """Where a tensor of `checkpoint_shapes` lies among the stored ones; None where it does not.

    tied: the embeddings are also the head, and may lie under either name.
    """
    if name in stored:
        return Source(name)
    if tied and name == EMBEDDING and HEAD in stored:
        return Source(HEAD)
    expert = _EXPERT.fullmatch(name)
    if expert is None:
        return None
    fused = f"{expert[1]}.down_proj" if expert[3] == "down" else f"{expert[1]}.gate_up_proj"
    half = {"gate": 0, "up": 1, "down": None}[expert[3]]
    return Source(fused, int(expert[2]), half) if fused in stored else None


def is_harmless(name: str) -> bool:
    """Whether a stored tensor that the model does not have can be let lie."""
    return any(pattern.fullmatch(name) for pattern in HARMLESS)


def dense_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of an attention replica's weights."""
    return sum(math.prod(shape) for shape in dense_shapes(config).values()) * DTYPE_BYTES[dtype]


def _layer_shapes(config: ModelConfig, layer_id: int) -> Shapes:
    prefix, hidden = f"model.layers.{layer_id}", config.hidden_size
    q_size = config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    shapes: Shapes = {f"{prefix}.input_layernorm.weight": (hidden,)}
    for name, size in (("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size)):
        shapes[f"{prefix}.self_attn.{name}.weight"] = (size, hidden)
        if config.qkv_bias:
            shapes[f"{prefix}.self_attn.{name}.bias"] = (size,)
    shapes[f"{prefix}.self_attn.o_proj.weight"] = (hidden, q_size)
    shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
    if not config.is_sparse(layer_id):
        return shapes | _swiglu_shapes(f"{prefix}.mlp", hidden, config.intermediate_size)
    shapes[f"{prefix}.mlp.gate.weight"] = (config.num_experts, hidden)  # [E, H]
    shapes |= _swiglu_shapes(f"{prefix}.mlp.shared_expert", hidden, config.shared_expert_intermediate_size)
    shapes[f"{prefix}.mlp.shared_expert_gate.weight"] = (1, hidden)
    return shapes


def _head_shapes(config: ModelConfig) -> Shapes:
    shapes: Shapes = {"model.norm.weight": (config.hidden_size,)}
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, config.hidden_size)  # [V, H]
    return shapes


def _swiglu_shapes(prefix: str, hidden: int, inner: int) -> Shapes:
    return {
        f"{prefix}.gate_proj.weight": (inner, hidden),  # [I, H]
        f"{prefix}.up_proj.weight": (inner, hidden),  # [I, H]
        f"{prefix}.down_proj.weight": (hidden, inner),  # [H, I]
    }
