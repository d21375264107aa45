"""Ranks with parts of weights in fewer bits: the logits and greedy tokens of one process with the same, in float32."""

import pytest
import torch
from configs import PROMPTS, config, dense
from gptq_tools import write_pair
from rank_tools import ThreadRanks
from stored_tools import GREEDY, offline, write_awq, write_packed

from cluster import llm as llm_module
from cluster.checkpoint.made.synthetic import write_checkpoint

SIZES = {"hidden_size": 128, "head_dim": 64, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 512}
RAW = {
    "qwen2": dense(**SIZES),
    "qwen2_moe": config(
        **SIZES, moe_intermediate_size=64, shared_expert_intermediate_size=512, num_experts=4, num_experts_per_tok=2
    ),
}
# Of `quantization`, and how many ranks its groups leave room for.
HERE = {"int8": 4, "int8+lm_head": 4, "int4": 2, "int4-64-zeros": 4, "int4-32": 4, "nf4": 4, "nf4+lm_head": 4}
STORED = {
    "GPTQ": write_pair,
    "GPTQ per column": lambda folder, raw: write_pair(folder, raw, group_size=-1, sym=False),
    "AWQ": write_awq,
    "AWQ of dense layers": lambda folder, raw: write_awq(folder, raw, kept=("self_attn", "gate")),
    "8 bits": write_packed,
    "4 bits with zeros": lambda folder, raw: write_packed(folder, raw, 4, 64, symmetric=False),
}
DEFAULT = [("qwen2", "nf4", 2), ("qwen2_moe", "int4-64-zeros", 4), ("qwen2_moe", "GPTQ", 2)]
CASES = [
    (family, weights, num_ranks)
    for family in RAW
    for weights in (*HERE, *STORED)
    for num_ranks in (2, 4)
    if num_ranks <= HERE.get(weights, 4)
]


@pytest.fixture(autouse=True)
def ranks_as_threads(monkeypatch):
    monkeypatch.setattr(llm_module, "ChildRanks", ThreadRanks)


@pytest.mark.parametrize(
    ("family", "weights", "num_ranks"),
    [pytest.param(*case, marks=() if case in DEFAULT else pytest.mark.slow) for case in CASES],
)
def test_rounded_weights_give_what_they_give_one_process(tmp_path, family, weights, num_ranks):
    if weights in STORED:
        model_dir, _ = STORED[weights](tmp_path, RAW[family])
        options = {}
    else:
        model_dir, options = tmp_path / "model", {"quantization": weights}
        write_checkpoint(model_dir, RAW[family], seed=5)
    found = []
    for size in (1, num_ranks):
        with offline(model_dir, tensor_parallel_size=size, **options) as llm:
            tokens = [output.token_ids for output in llm.generate(PROMPTS, GREEDY)]
            found.append(([llm.logits(prompt) for prompt in PROMPTS], tokens))
    (one_process, its_tokens), (ours, tokens) = found
    for logits, expected in zip(ours, one_process, strict=True):
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-5)
    assert tokens == its_tokens
