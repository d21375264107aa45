"""Which tensors a `ModelConfig` implies, by name and shape. Knows no files and no tensors.

Names are those of the released checkpoints: experts lie there one by one, not fused.
H hidden, V vocabulary, E experts, I a SwiGLU's inner size.
"""

import math

from cluster.config import DTYPE_BYTES, ModelConfig

Shapes = dict[str, tuple[int, ...]]


def dense_shapes(config: ModelConfig) -> Shapes:
    """Everything that an attention replica holds: all but the routed experts, in the model's order."""
    shapes: Shapes = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}  # [V, H]
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
    shapes: Shapes = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}  # [V, H]
    for layer_id in range(config.num_hidden_layers):
        shapes |= _layer_shapes(config, layer_id)
        if config.is_sparse(layer_id):
            for expert_id in range(config.num_experts):
                shapes |= expert_shapes(config, layer_id, expert_id)
    return shapes | _head_shapes(config)


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
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)  # [V, H]
    return shapes


def _swiglu_shapes(prefix: str, hidden: int, inner: int) -> Shapes:
    return {
        f"{prefix}.gate_proj.weight": (inner, hidden),  # [I, H]
        f"{prefix}.up_proj.weight": (inner, hidden),  # [I, H]
        f"{prefix}.down_proj.weight": (hidden, inner),  # [H, I]
    }
