"""A model that several ranks share against transformers, in float32: logits within 1e-4, the same greedy tokens.

The ranks are threads here, which gloo joins as it does processes; tests/unit/test_ranks.py has processes.
"""

import pytest
import torch
from configs import CONFIGS, DENSE_CONFIGS, PROMPTS, config, dense
from drafters import always
from rank_tools import ThreadRanks
from test_parity_local import check_drafts, llm_for, tokens

from cluster import LLM
from cluster import llm as llm_module
from cluster.checkpoint.made.synthetic import write_checkpoint

NAMES = [*CONFIGS, *DENSE_CONFIGS]
DEFAULT = [("released key style, 60 experts", 4), ("qwen2, new key style, tied embeddings, MHA", 2)]
"""A case of each family; the others take long."""

# All have 4 query heads, most 2 key/value heads: of 3 or 4 ranks two have a copy of the same one.
CASES = [(name, 2 + i % 3) for i, name in enumerate(NAMES)]
CASES += [case for case in ((name, num) for name, _ in DEFAULT for num in (2, 3, 4)) if case not in CASES]


@pytest.fixture(autouse=True)
def ranks_as_threads(monkeypatch):
    monkeypatch.setattr(llm_module, "ChildRanks", ThreadRanks)


@pytest.mark.parametrize(
    ("name", "num_ranks"),
    [pytest.param(*case, marks=() if case in DEFAULT else pytest.mark.slow) for case in CASES],
)
def test_logits_and_greedy_tokens_are_those_of_transformers(oracle_of, name, num_ranks):
    """In chunks, in two parts, then with beginnings that are cached."""
    oracle = oracle_of(name)
    with llm_for(oracle, tensor_parallel_size=num_ranks, block_size=4, max_num_batched_tokens=24) as llm:
        llm.engine.runner.micro_batching.choose = lambda num_tokens, num_sequences: min(2, num_sequences)
        for prompt, expected in zip(PROMPTS, oracle.logits, strict=True):
            torch.testing.assert_close(llm.logits(prompt), expected, atol=1e-4, rtol=0)
        assert tokens(llm) == oracle.token_ids
        assert tokens(llm) == oracle.token_ids


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, _ in DEFAULT])
def test_several_tokens_a_step_give_the_same(oracle_of, name):
    check_drafts(oracle_of(name), tensor_parallel_size=2)


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [name for name, _ in DEFAULT])
def test_a_draft_model_is_rank_0s_alone(oracle_of, tmp_path, name, num_ranks):
    """The dense model guesses for itself, so always right; a stranger guesses for the other one."""
    oracle, draft = oracle_of(name), tmp_path / "stranger"
    if is_dense := name in DENSE_CONFIGS:
        draft = oracle.model_dir
    else:
        write_checkpoint(draft, dense(num_hidden_layers=1), seed=3)
    drafts = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 3}
    with llm_for(oracle, block_size=4, tensor_parallel_size=num_ranks, speculative_config=drafts) as llm:
        always(llm)
        assert tokens(llm) == oracle.token_ids
        stats = llm.engine.stats()
        assert stats.drafted_tokens > 10
        assert (stats.accepted_tokens == stats.drafted_tokens) == is_dense


@pytest.mark.slow
@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
def test_a_cache_in_8_bits_holds_what_one_process_would_have(oracle_of, kv_cache_dtype):
    """Each head of a token has a scale of its own, so that a rank rounds its heads as all of them are rounded."""
    oracle, found = oracle_of("released key style, 60 experts"), []
    for num_ranks in (1, 2, 4):
        options = {"tensor_parallel_size": num_ranks, "kv_cache_dtype": kv_cache_dtype}
        with llm_for(oracle, **options) as llm:
            found.append([llm.logits(prompt) for prompt in PROMPTS])
    for other in found[1:]:
        for ours, one_process in zip(other, found[0], strict=True):
            assert (ours - one_process).norm() < 0.02 * one_process.norm()


@pytest.mark.slow
@pytest.mark.parametrize("expert_quantization", ["int8", "int4", "nf4"])
def test_experts_in_fewer_bits_give_what_they_give_one_process(tmp_path, expert_quantization):
    write_checkpoint(tmp_path / "model", config(hidden_size=128, moe_intermediate_size=128, num_experts=8), seed=5)
    found = []
    for num_ranks in (1, 2):
        with LLM(
            tmp_path / "model", dtype="float32", device="cpu", skip_tokenizer=True, kv_cache_bytes=1 << 22,
            expert_quantization=expert_quantization, tensor_parallel_size=num_ranks,
        ) as llm:  # fmt: skip
            found.append([llm.logits(prompt) for prompt in PROMPTS])
    for ours, one_process in zip(*reversed(found), strict=True):
        torch.testing.assert_close(ours, one_process, atol=1e-4, rtol=0)
