"""The whole model in one process against transformers, in float32: logits within 1e-4, the same greedy tokens."""

import pytest
import torch
from configs import NUM_TOKENS, PROMPTS
from drafters import Told, always

from cluster import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0, repetition_penalty=1.0, max_tokens=NUM_TOKENS, ignore_eos=True)


def llm_for(oracle, **options):
    return LLM(
        oracle.model_dir, dtype="float32", device="cpu", skip_tokenizer=True, **{"kv_cache_bytes": 1 << 22, **options}
    )


def tokens(llm):
    return [list(output.token_ids) for output in llm.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7])
def test_logits_and_greedy_tokens_are_those_of_transformers(oracle, num_shards):
    with llm_for(oracle, num_expert_shards=num_shards) as llm:
        for prompt, expected in zip(PROMPTS, oracle.logits, strict=True):
            torch.testing.assert_close(llm.logits(prompt), expected, atol=1e-4, rtol=0)
        assert tokens(llm) == oracle.token_ids


def test_prompts_in_chunks_of_7_give_the_same(oracle):
    with llm_for(oracle, num_expert_shards=2, max_num_batched_tokens=7) as llm:
        for prompt, expected in zip(PROMPTS, oracle.logits, strict=True):
            torch.testing.assert_close(llm.logits(prompt), expected, atol=1e-4, rtol=0)
        assert tokens(llm) == oracle.token_ids


def watch_batches(llm):
    """The batches that are scheduled from now on, as they come."""
    schedule, batches = llm.engine.scheduler.schedule, []

    def watched():
        batches.append(schedule())
        return batches[-1]

    llm.engine.scheduler.schedule = watched
    return batches


def test_prompts_whose_beginning_is_cached_give_the_same(oracle):
    with llm_for(oracle, num_expert_shards=2, block_size=4) as llm:
        assert tokens(llm) == oracle.token_ids
        batches = watch_batches(llm)
        assert tokens(llm) == oracle.token_ids
        assert sum(batch.num_reused_tokens for batch in batches) > 0


def test_steps_in_two_parts_give_the_same(oracle):
    with llm_for(oracle, num_expert_shards=2, block_size=4) as llm:
        llm.engine.runner.micro_batching.choose = lambda num_tokens, num_sequences: min(2, num_sequences)
        assert tokens(llm) == oracle.token_ids


def test_preempted_sequences_give_the_same(oracle):
    """Room for 11 blocks of 4 tokens: the longest sequence takes all of them, so the others must give theirs up."""
    with llm_for(oracle, num_expert_shards=2, block_size=4) as llm:
        block_bytes = 4 * llm.engine.runner.model.config.kv_bytes_per_token("float32")
    with llm_for(oracle, num_expert_shards=2, block_size=4, kv_cache_bytes=11 * block_bytes) as llm:
        batches = watch_batches(llm)
        assert tokens(llm) == oracle.token_ids
        assert sum(batch.num_preempted for batch in batches) > 0
        assert llm.engine.blocks.num_used == 0


def test_several_tokens_a_step_give_the_same(oracle):
    check_drafts(oracle, num_expert_shards=2)


def check_drafts(oracle, **options):
    """Drafts are the oracle's own tokens, some of them replaced."""
    drafter = Told(zip(PROMPTS, oracle.token_ids, strict=True), wrong=0.3, vocab_size=200)
    ngram = {"method": "ngram", "num_speculative_tokens": 3}
    with llm_for(oracle, block_size=4, speculative_config=ngram, **options) as llm:
        payoff = always(llm, drafter)
        assert tokens(llm) == oracle.token_ids
        assert sum(payoff.tried) > 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_cuda_gives_the_tokens_or_near_logits(oracle, dtype):
    """By the norm of the difference: single logits of half precision lie far off now and then."""
    tolerance = {"float32": 1e-4, "bfloat16": 0.06, "float16": 0.03}[dtype]
    with LLM(oracle.model_dir, dtype=dtype, device="cuda", skip_tokenizer=True, kv_cache_bytes=1 << 22) as llm:
        for prompt, expected in zip(PROMPTS, oracle.logits, strict=True):
            assert (llm.logits(prompt).cpu() - expected).norm() < tolerance * expected.norm()
        if dtype == "float32":
            assert tokens(llm) == oracle.token_ids


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["released key style, 60 experts", "qwen2, new key style, tied embeddings, MHA"])
def test_half_precision_stays_near_the_float32_distribution(oracle_of, name, dtype):
    """The likeliest token in half precision is among the five likeliest in float32 at every position."""
    oracle = oracle_of(name)
    with LLM(oracle.model_dir, dtype=dtype, device="cpu", skip_tokenizer=True, kv_cache_bytes=1 << 22) as llm:
        for prompt, expected in zip(PROMPTS, oracle.logits, strict=True):
            best = llm.logits(prompt).argmax(dim=-1)
            assert (expected.topk(5).indices == best[:, None]).any(dim=1).all()
