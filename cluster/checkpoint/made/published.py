"""The config.json of released models: every number that decides shapes, as published, for the base models."""

from collections.abc import Mapping
from typing import Any

_COMMON: dict[str, Any] = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "qwen2_moe",
    "norm_topk_prob": False,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

A2_7B_CONFIG: dict[str, Any] = {  # Qwen1.5-MoE-A2.7B
    **_COMMON,
    "eos_token_id": 151643,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 8192,
    "max_window_layers": 21,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768,
}

QWEN2_57B_A14B_CONFIG: dict[str, Any] = {  # Qwen2-57B-A14B-Instruct
    **_COMMON,
    "eos_token_id": 151645,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "moe_intermediate_size": 2560,
    "num_attention_heads": 28,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "shared_expert_intermediate_size": 20480,
    "sliding_window": 65536,
}


def _dense(
    sizes: tuple[int, int, int, int, int], *, tied: bool = False, vocab_size: int = 152064, **others: Any
) -> dict[str, Any]:
    """A dense model's. sizes: hidden, intermediate, layers, heads, key-value heads.  others: keys that differ."""
    hidden, intermediate, num_layers, num_heads, num_key_value_heads = sizes
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "max_position_embeddings": 32768,
        "max_window_layers": num_layers,
        "model_type": "qwen2",
        "num_attention_heads": num_heads,
        "num_hidden_layers": num_layers,
        "num_key_value_heads": num_key_value_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocab_size,
        **others,
    }


_SMALL_VOCABULARY = 151936
_LONG: dict[str, Any] = {"max_position_embeddings": 131072, "sliding_window": 131072}

PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "Qwen1.5-MoE-A2.7B": A2_7B_CONFIG,
    "Qwen2-57B-A14B": QWEN2_57B_A14B_CONFIG,
    "Qwen1.5-0.5B": _dense((1024, 2816, 24, 16, 16), tied=True, vocab_size=_SMALL_VOCABULARY, max_window_layers=21),
    "Qwen1.5-1.8B": _dense((2048, 5504, 24, 16, 16), vocab_size=_SMALL_VOCABULARY, max_window_layers=21),
    "Qwen1.5-4B": _dense(
        (2560, 6912, 40, 20, 20), vocab_size=_SMALL_VOCABULARY, max_window_layers=21, rope_theta=5000000.0
    ),
    "Qwen1.5-7B": _dense((4096, 11008, 32, 32, 32), vocab_size=_SMALL_VOCABULARY, max_window_layers=28),
    "Qwen1.5-14B": _dense((5120, 13696, 40, 40, 40), max_window_layers=35),
    "Qwen1.5-32B": _dense((5120, 27392, 64, 40, 8), max_window_layers=35),
    "Qwen1.5-72B": _dense((8192, 24576, 80, 64, 64), max_window_layers=70),
    "Qwen1.5-110B": _dense((8192, 49152, 80, 64, 8), max_window_layers=70),
    "Qwen2-0.5B": _dense((896, 4864, 24, 14, 2), tied=True, vocab_size=_SMALL_VOCABULARY, **_LONG),
    "Qwen2-1.5B": _dense((1536, 8960, 28, 12, 2), tied=True, vocab_size=_SMALL_VOCABULARY, **_LONG),
    "Qwen2-7B": _dense((3584, 18944, 28, 28, 4), **_LONG),
    "Qwen2-72B": _dense((8192, 29568, 80, 64, 8), **_LONG),
    "Qwen2.5-0.5B": _dense((896, 4864, 24, 14, 2), tied=True, vocab_size=_SMALL_VOCABULARY),
    "Qwen2.5-1.5B": _dense((1536, 8960, 28, 12, 2), tied=True, vocab_size=_SMALL_VOCABULARY, **_LONG),
    "Qwen2.5-3B": _dense((2048, 11008, 36, 16, 2), tied=True, vocab_size=_SMALL_VOCABULARY),
    "Qwen2.5-7B": _dense((3584, 18944, 28, 28, 4), **_LONG),
    "Qwen2.5-14B": _dense((5120, 13824, 48, 40, 8), **_LONG),
    "Qwen2.5-32B": _dense((5120, 27648, 64, 40, 8), **_LONG),
    "Qwen2.5-72B": _dense((8192, 29568, 80, 64, 8), **_LONG),
}

_SHORT = {"a2.7b": "Qwen1.5-MoE-A2.7B", "57b-a14b": "Qwen2-57B-A14B"}
_DENSE = {name.lower(): name for name, raw in PUBLISHED.items() if raw["model_type"] == "qwen2"}

SHAPES: Mapping[str, Mapping[str, Any]] = {short: PUBLISHED[name] for short, name in (_SHORT | _DENSE).items()}
"""Names for the command line: `a2.7b`, `qwen2-0.5b`."""
