"""Every released model at a reduced width: its own layers, heads, experts, flags and numbers, against transformers.

Hidden and inner sizes, head_dim (4) and the vocabulary are small; all else is the released config's.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from configs import NUM_TOKENS, PROMPTS
from parity_tools import ask_transformers

from cluster import LLM, SamplingParams
from cluster.checkpoint.made.published import PUBLISHED
from cluster.checkpoint.made.synthetic import write_checkpoint

HEAD_DIM = 4
VOCABULARY = 503
GREEDY = SamplingParams(temperature=0, repetition_penalty=1.0, max_tokens=NUM_TOKENS, ignore_eos=True)
FILES = Path(__file__).parents[1] / "data" / "published"
MOE = {path.parent.name: json.loads(path.read_text()) for path in FILES.glob("*/config.json")}
DENSE = {name: raw for name, raw in PUBLISHED.items() if raw["model_type"] == "qwen2"}
QUICK = ("Qwen1.5-MoE-A2.7B", "Qwen2-0.5B")
NAMES = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in MOE | DENSE]


def reduced(raw: dict[str, Any]) -> dict[str, Any]:
    """initializer_range: so large that each layer changes the logits, so small that 80 of them stay exact."""
    hidden = raw["num_attention_heads"] * HEAD_DIM
    small = {"hidden_size": hidden, "intermediate_size": hidden + 16, "vocab_size": VOCABULARY, "eos_token_id": 1}
    if "num_experts" in raw:
        small |= {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 24}
    return {**raw, **small, "torch_dtype": "float32", "initializer_range": hidden**-0.5}


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_greedy_tokens_are_those_of_transformers(name, tmp_path):
    write_checkpoint(tmp_path / "model", reduced((MOE | DENSE)[name]), seed=5)
    oracle = ask_transformers(tmp_path / "model")
    with LLM(
        tmp_path / "model", dtype="float32", device="cpu", skip_tokenizer=True, kv_cache_bytes=1 << 25,
        num_expert_shards=7, max_model_len=256,
    ) as llm:  # fmt: skip
        for prompt, expected in zip(PROMPTS, oracle.logits, strict=True):
            torch.testing.assert_close(llm.logits(prompt), expected, atol=1e-4, rtol=1e-4)
        assert [list(output.token_ids) for output in llm.generate(PROMPTS, GREEDY)] == oracle.token_ids


def mixed(raw: dict[str, Any], first_sliding: int) -> dict[str, Any]:
    """A window of 6 tokens in a part of the layers, as the released configs have it switched off."""
    return {**reduced(raw), "use_sliding_window": True, "sliding_window": 6, "max_window_layers": first_sliding}


@pytest.mark.parametrize(
    "name",
    ["Qwen2-0.5B", *(pytest.param(name, marks=pytest.mark.slow) for name in ("Qwen1.5-0.5B", "Qwen1.5-MoE-A2.7B"))],
)
def test_windows_in_a_part_of_the_layers_are_those_of_transformers(name, tmp_path):
    """Of dense models the layers from max_window_layers on slide, of MoE ones every second before it."""
    write_checkpoint(tmp_path / "model", mixed((MOE | DENSE)[name], 13), seed=6)
    oracle = ask_transformers(tmp_path / "model")
    with LLM(
        tmp_path / "model", dtype="float32", device="cpu", skip_tokenizer=True, kv_cache_bytes=1 << 25,
        num_expert_shards=2, block_size=4, max_model_len=256,
    ) as llm:  # fmt: skip
        kinds = set(llm.engine.runner.model.config.layer_types)
        assert kinds == {"full_attention", "sliding_attention"}
        for _ in range(2):  # the second time from the prefix cache
            assert [list(output.token_ids) for output in llm.generate(PROMPTS, GREEDY)] == oracle.token_ids
