"""Qwen2-MoE: Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B. Source: transformers 5.24, Qwen2MoeConfig and Qwen2MoeModel.

H: hidden size, E: routed experts of a layer.
"""

from cluster.config.architectures.architecture import (
    Architecture,
    Shapes,
    attention_shapes,
    num_layers,
    read_decoder,
    read_layer_types,
    swiglu_shapes,
)
from cluster.config.json_keys import Keys
from cluster.config.model import ModelConfig, MoeConfig


def _read(keys: Keys) -> ModelConfig:
    return read_decoder(
        keys,
        "qwen2_moe",
        qkv_bias=keys.flag("qkv_bias", True),
        layer_types=read_layer_types(keys, lambda layer_id, limit: layer_id % 2 == 0 and layer_id < limit),
        moe=_read_moe(keys),
    )


def _read_moe(keys: Keys) -> MoeConfig | None:
    """None where `mlp_only_layers` names every layer."""
    moe = MoeConfig(
        num_experts=keys.count("num_experts"),
        num_experts_per_tok=keys.count("num_experts_per_tok"),
        norm_topk_prob=keys.flag("norm_topk_prob", False),
        moe_intermediate_size=keys.count("moe_intermediate_size"),
        shared_expert_intermediate_size=keys.count("shared_expert_intermediate_size"),
        sparse_layers=_sparse_layers(keys),
    )
    return moe if moe.sparse_layers else None


def _sparse_layers(keys: Keys) -> tuple[int, ...]:
    step, dense = keys.count("decoder_sparse_step", 1), set(keys.ids("mlp_only_layers"))
    return tuple(i for i in range(num_layers(keys)) if i not in dense and (i + 1) % step == 0)


def _layer_shapes(config: ModelConfig, layer_id: int) -> Shapes:
    prefix, hidden, shapes = f"model.layers.{layer_id}.mlp", config.hidden_size, attention_shapes(config, layer_id)
    if config.moe is None or not config.is_sparse(layer_id):
        return shapes | swiglu_shapes(prefix, hidden, config.intermediate_size)
    shapes[f"{prefix}.gate.weight"] = (config.moe.num_experts, hidden)  # [E, H]
    shapes |= swiglu_shapes(f"{prefix}.shared_expert", hidden, config.moe.shared_expert_intermediate_size)
    shapes[f"{prefix}.shared_expert_gate.weight"] = (1, hidden)
    return shapes


def _expert_shapes(config: ModelConfig, layer_id: int, expert_id: int) -> Shapes:
    assert config.moe is not None
    prefix = f"model.layers.{layer_id}.mlp.experts.{expert_id}"
    return swiglu_shapes(prefix, config.hidden_size, config.moe.moe_intermediate_size)


QWEN2_MOE = Architecture(
    model_type="qwen2_moe",
    class_name="Qwen2Moe",
    read=_read,
    layer_shapes=_layer_shapes,
    expert_shapes=_expert_shapes,
)
