"""Names and shapes against transformers' own module tree, and sums against the published sizes."""

import math
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from cluster.checkpoint.made.published import A2_7B_CONFIG, QWEN2_57B_A14B_CONFIG
from cluster.checkpoint.names import checkpoint_shapes, dense_bytes, dense_shapes, expert_shapes
from cluster.config import read_model_config

SMALL = {
    **A2_7B_CONFIG,
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 20,
    "moe_intermediate_size": 10,
    "shared_expert_intermediate_size": 14,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "num_experts": 5,
    "num_experts_per_tok": 2,
}


SMALL_DENSE = {
    "model_type": "qwen2", "vocab_size": 50, "hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 6,
    "num_key_value_heads": 2, "num_hidden_layers": 3, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip


def transformers_shapes(raw: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        dense = raw["model_type"] == "qwen2"
        model = Qwen2ForCausalLM(Qwen2Config(**raw)) if dense else Qwen2MoeForCausalLM(Qwen2MoeConfig(**raw))
    # Tied weights stand twice in the state dict; a checkpoint has them once.
    tied = {"lm_head.weight"} if raw["tie_word_embeddings"] else set()
    return {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in tied}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qkv_bias": False},
        {"tie_word_embeddings": True},
        {"mlp_only_layers": [0, 3]},
        {"decoder_sparse_step": 2},
        {"head_dim": 8},
    ],
    ids=str,
)
def test_names_and_shapes_are_those_of_transformers(changes: dict[str, Any]) -> None:
    """transformers 5 holds a layer's experts fused: gate and up as [E, 2·I, H], down as [E, H, I]."""
    raw = {**SMALL, **changes}
    config = read_model_config(raw)
    expected = transformers_shapes(raw)
    fused = {name: expected.pop(name) for name in list(expected) if ".experts." in name}

    assert dense_shapes(config) == expected
    assert {int(name.split(".")[2]) for name in fused} == set(config.sparse_layers)
    for layer_id in config.sparse_layers:
        prefix = f"model.layers.{layer_id}.mlp.experts"
        assert fused[f"{prefix}.gate_up_proj"] == (5, 2 * 10, 24)
        assert fused[f"{prefix}.down_proj"] == (5, 24, 10)
        for expert_id in range(5):
            assert expert_shapes(config, layer_id, expert_id) == {
                f"{prefix}.{expert_id}.gate_proj.weight": (10, 24),
                f"{prefix}.{expert_id}.up_proj.weight": (10, 24),
                f"{prefix}.{expert_id}.down_proj.weight": (24, 10),
            }


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 6}], ids=str)
def test_names_and_shapes_of_dense_qwen2_are_those_of_transformers(changes: dict[str, Any]) -> None:
    raw = {**SMALL_DENSE, **changes}
    config = read_model_config(raw)
    assert checkpoint_shapes(config) == dense_shapes(config) == transformers_shapes(raw)
    with pytest.raises(AssertionError, match="qwen2 has no experts"):
        expert_shapes(config, 0, 0)


@pytest.mark.parametrize(
    ("sizes", "billion_parameters"),
    [
        ((151936, 896, 4864, 24, 14, 2, True), 0.49),  # vocabulary, hidden, intermediate, layers, heads, KV heads, tied
        ((151936, 1536, 8960, 28, 12, 2, True), 1.54),
        ((152064, 3584, 18944, 28, 28, 4, False), 7.61),
    ],
    ids=["Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-7B"],
)
def test_dense_qwen2_models_have_the_sizes_of_their_cards(sizes: tuple[Any, ...], billion_parameters: float) -> None:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "tie_word_embeddings")  # fmt: skip
    config = read_model_config({**SMALL_DENSE, **dict(zip(names, sizes, strict=True))})
    assert dense_bytes(config, "bfloat16") / 2e9 == pytest.approx(billion_parameters, abs=0.006)


def test_a_checkpoint_is_the_dense_part_and_every_expert_of_every_sparse_layer() -> None:
    """With step 2, layers 1 and 3 of 4 are sparse: 2 · 5 experts · 3 matrices beside the dense tensors."""
    config = read_model_config({**SMALL, "decoder_sparse_step": 2})
    names, dense = checkpoint_shapes(config), dense_shapes(config)
    assert {name: names[name] for name in dense} == dense
    assert len(names) - len(dense) == 2 * 5 * 3
    assert list(names)[-2:] == ["model.norm.weight", "lm_head.weight"]


def test_a_dense_layer_has_no_experts_to_name() -> None:
    config = read_model_config({**SMALL, "mlp_only_layers": [1]})
    with pytest.raises(AssertionError, match="layer 1 has no experts"):
        expert_shapes(config, 1, 0)


@pytest.mark.parametrize(
    ("raw", "billion_parameters", "read_gb", "routed_gb"),
    [(A2_7B_CONFIG, 14.3, 3.1, 24.9), (QWEN2_57B_A14B_CONFIG, 57.4, 15.1, 98.7)],
    ids=["A2.7B", "57B-A14B"],
)
def test_released_models_have_their_published_sizes(
    raw: dict[str, Any], billion_parameters: float, read_gb: float, routed_gb: float
) -> None:
    """Parameters as on the model cards. In bfloat16, what each step reads (all but the embedding's table, of
    which it looks rows up) and the routed experts have the sizes that the design was made for."""
    config = read_model_config(raw)
    total = sum(math.prod(shape) for shape in checkpoint_shapes(config).values())
    assert total / 1e9 == pytest.approx(billion_parameters, abs=0.06)
    embedding_bytes = 2 * config.vocab_size * config.hidden_size
    read_bytes = dense_bytes(config, "bfloat16") - embedding_bytes
    assert read_bytes / 1e9 == pytest.approx(read_gb, abs=0.06)
    routed = len(config.sparse_layers) * config.num_experts * config.expert_bytes("bfloat16")
    assert routed / 1e9 == pytest.approx(routed_gb, abs=0.06)
    assert dense_bytes(config, "float32") == 2 * dense_bytes(config, "bfloat16")
