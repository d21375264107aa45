"""Writes a small, complete checkpoint: weights, tokenizer, chat template, generation defaults.

Its weights are random and its answers gibberish, but every file has the published form: a server of it serves a
released model too. Nothing is downloaded.
"""

from pathlib import Path
from typing import Any

from cluster.checkpoint.generation import GENERATION_FILE
from cluster.checkpoint.made.synthetic import write_checkpoint, write_json
from cluster.checkpoint.made.tokenizer import ENDOFTEXT, IM_END, SPECIALS, VOCAB_SIZE, write_tokenizer
from cluster.errors import CheckpointError

_MAX_FILE_BYTES = 3_000_000
_CONTEXT_TOKENS = 4096


def write_demo_checkpoint(model_dir: str | Path, seed: int = 0, *, model_type: str = "qwen2_moe") -> None:
    """Writes the whole directory, about 8 MB, a dense one 2 MB; the same bytes for the same seed.

    model_type: "qwen2_moe", or "qwen2" for a dense one.
    Raises CheckpointError where the directory has weights already, or where writing fails.
    """
    model_dir = Path(model_dir)
    ids = {text: VOCAB_SIZE - len(SPECIALS) + i for i, text in enumerate(SPECIALS)}
    write_checkpoint(model_dir, _config(model_type, ids), seed=seed, max_file_bytes=_MAX_FILE_BYTES)
    write_tokenizer(model_dir, VOCAB_SIZE, _CONTEXT_TOKENS)
    write_json(
        model_dir / GENERATION_FILE,
        {
            "bos_token_id": ids[ENDOFTEXT],
            "pad_token_id": ids[ENDOFTEXT],
            "eos_token_id": [ids[IM_END], ids[ENDOFTEXT]],
            "do_sample": True,
            "temperature": 0.7,
            "top_p": 0.8,
            "top_k": 20,
            "repetition_penalty": 1.05,
            "max_new_tokens": 64,
        },
    )


def _config(model_type: str, ids: dict[str, int]) -> dict[str, Any]:
    """Grouped key-value heads, all else small. Raises CheckpointError for a family that has no demo.

    initializer_range: 1 / sqrt(hidden_size). So logits of router and lm_head have deviation 1, and routing
    is neither uniform nor fixed.
    """
    if model_type not in _OF_FAMILY:
        raise CheckpointError(f"model_type is {model_type!r}, one of {', '.join(_OF_FAMILY)} is needed for a demo")
    common = {
        "attention_dropout": 0.0,
        "bos_token_id": ids[ENDOFTEXT],
        "eos_token_id": ids[IM_END],
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.125,
        "intermediate_size": 128,
        "max_position_embeddings": _CONTEXT_TOKENS,
        "max_window_layers": 4,
        "model_type": model_type,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": _CONTEXT_TOKENS,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": VOCAB_SIZE,
    }
    return dict(sorted({**common, **_OF_FAMILY[model_type]}.items()))


_OF_FAMILY: dict[str, dict[str, Any]] = {
    "qwen2": {  # tied as in Qwen2-0.5B
        "architectures": ["Qwen2ForCausalLM"],
        "tie_word_embeddings": True,
    },
    "qwen2_moe": {  # 64 experts and top-8 as in Qwen2-57B-A14B
        "architectures": ["Qwen2MoeForCausalLM"],
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 32,
        "norm_topk_prob": False,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 128,
        "tie_word_embeddings": False,
    },
}
