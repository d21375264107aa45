"""Small random configurations that between them take every branch of each model family."""

from typing import Any

BASE: dict[str, Any] = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "vocab_size": 211,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.2,  # ten times the usual, so that logits differ by more than rounding
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
    "eos_token_id": 1,
}

_OF_EXPERTS = (
    "moe_intermediate_size", "shared_expert_intermediate_size", "num_experts", "num_experts_per_tok", "norm_topk_prob",
    "decoder_sparse_step",
)  # fmt: skip

BASE_DENSE: dict[str, Any] = {key: value for key, value in BASE.items() if key not in _OF_EXPERTS} | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
}

NEW_STYLE: dict[str, Any] = {
    "rope_theta": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "torch_dtype": None,
    "dtype": "float32",
}


def config(**changes: Any) -> dict[str, Any]:
    """`BASE` with changes; a key set to None is left out."""
    return {key: value for key, value in {**BASE, **changes}.items() if value is not None}


def dense(**changes: Any) -> dict[str, Any]:
    """`BASE_DENSE` with changes; a key set to None is left out."""
    return {key: value for key, value in {**BASE_DENSE, **changes}.items() if value is not None}


CONFIGS: dict[str, dict[str, Any]] = {
    "released key style, 60 experts": config(),
    "new key style, 64 experts, EOS list": config(
        **NEW_STYLE, num_experts=64, num_experts_per_tok=8, eos_token_id=[1, 2]
    ),
    "every second layer sparse, a dense one named": config(
        num_hidden_layers=4, decoder_sparse_step=2, mlp_only_layers=[3]
    ),
    "top-k weights that sum to one, MHA, no bias": config(norm_topk_prob=True, num_key_value_heads=4, qkv_bias=False),
    "tied embeddings, heads wider than hidden": config(**NEW_STYLE, tie_word_embeddings=True, head_dim=16),
    "sliding window by max_window_layers": config(
        use_sliding_window=True, sliding_window=5, max_window_layers=2, num_hidden_layers=4
    ),
    "sliding window by layer_types": config(
        **NEW_STYLE, use_sliding_window=True, sliding_window=7,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
    ),
    "YaRN": config(
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    ),
    "linear scaling": config(
        **{**NEW_STYLE, "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}
    ),
}  # fmt: skip

DENSE_CONFIGS: dict[str, dict[str, Any]] = {
    "no layer sparse": config(mlp_only_layers=[0, 1, 2]),
    "qwen2, released key style": dense(),
    "qwen2, new key style, tied embeddings, MHA": dense(**NEW_STYLE, tie_word_embeddings=True, num_key_value_heads=4),
    "qwen2, sliding window by max_window_layers": dense(
        use_sliding_window=True, sliding_window=5, max_window_layers=2, num_hidden_layers=4
    ),
    "qwen2, sliding window by layer_types": dense(
        **NEW_STYLE, use_sliding_window=True, sliding_window=7,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "qwen2, YaRN": dense(rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
}  # fmt: skip

PROMPTS: list[list[int]] = [[5], list(range(10, 42)), [7, 3, 7, 3, 7, 3, 9], list(range(100, 119))]
"""Lengths 1 to 32: longer than the windows and than YaRN's original context."""
NUM_TOKENS = 10
