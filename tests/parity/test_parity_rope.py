"""Frequencies that grow with the sequence, and an override of them, against transformers in float32.

Its frequencies are those of the longest sequence of a batch, and it keeps them for the next call: so the oracle answers
one prompt at a time, each with a model that has seen no other.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from configs import config, dense
from test_parity_local import watch_batches

from cluster import LLM, SamplingParams
from cluster.checkpoint.made.synthetic import write_checkpoint
from cluster.errors import CheckpointError, SetupError

ORIGINAL, NUM_TOKENS = 16, 12
PROMPTS = [list(range(5, 12)), list(range(40, 56)), list(range(100, 124)), list(range(5, 9)), list(range(5, 30))]
"""7 tokens grow beyond 16, 16 fill them, 24 are beyond at once; the first, fourth and fifth begin alike."""
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 8, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.4], "long_factor": [1.3, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": ORIGINAL,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2_moe, dynamic": config(rope_scaling=DYNAMIC, max_position_embeddings=ORIGINAL),
    "qwen2, dynamic": dense(rope_scaling=DYNAMIC, max_position_embeddings=ORIGINAL),
    "qwen2, longrope": dense(rope_scaling=LONGROPE, max_position_embeddings=64),
    "qwen2, llama3": dense(rope_scaling=LLAMA3, max_position_embeddings=64),
}


def answer_of(model_dir, prompt):
    """Logits [T, vocab] of one forward of the prompt, and greedy tokens with a cache."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        logits = model(torch.tensor([prompt])).logits[0]
    fresh = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager").eval()
    fresh.generation_config.eos_token_id = None
    ids = fresh.generate(torch.tensor([prompt]), max_new_tokens=NUM_TOKENS, do_sample=False)
    return logits, ids[0, len(prompt) :].tolist()


@pytest.fixture(scope="module", params=CONFIGS)
def case(request, tmp_path_factory):
    model_dir = tmp_path_factory.mktemp("rope") / "model"
    write_checkpoint(model_dir, CONFIGS[request.param], seed=3)
    answers = [answer_of(model_dir, prompt) for prompt in PROMPTS]
    return model_dir, [logits for logits, _ in answers], [tokens for _, tokens in answers]


def tokens_of(llm, prompts=PROMPTS):
    params = SamplingParams(temperature=0, repetition_penalty=1.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    return [list(output.token_ids) for output in llm.generate(prompts, params)]


def llm_for(model_dir, **options):
    options = {"kv_cache_bytes": 1 << 22, "block_size": 4, **options}
    return LLM(model_dir, dtype="float32", device="cpu", skip_tokenizer=True, **options)


@pytest.mark.parametrize("chunk", [2048, 5])
def test_prompts_and_answers_beyond_the_original_context_are_those_of_transformers(case, chunk):
    """All in one batch, in chunks too, and a second time with the blocks of the first."""
    model_dir, logits, tokens = case
    with llm_for(model_dir, max_num_batched_tokens=chunk) as llm:
        assert llm.info.max_model_len == 64
        for prompt, expected in zip(PROMPTS, logits, strict=True):
            torch.testing.assert_close(llm.logits(prompt), expected, atol=1e-4, rtol=0)
        assert tokens_of(llm) == tokens
        batches = watch_batches(llm)
        assert tokens_of(llm) == tokens
        assert sum(batch.num_reused_tokens for batch in batches) > 0


def test_preempted_answers_are_the_same(case):
    model_dir, _, tokens = case
    with llm_for(model_dir) as llm:
        block_bytes = 4 * llm.engine.runner.model.config.kv_bytes_per_token("float32")
    with llm_for(model_dir, kv_cache_bytes=10 * block_bytes) as llm:
        batches = watch_batches(llm)
        assert tokens_of(llm) == tokens
        assert sum(batch.num_preempted for batch in batches) > 0


def test_an_answer_that_goes_on_elsewhere_is_the_same(case):
    """A replay brings prompt and answer so far; the prompt's length decides as before."""
    model_dir, _, tokens = case
    params = SamplingParams(temperature=0, repetition_penalty=1.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    with llm_for(model_dir) as llm:
        for i, prompt in enumerate(PROMPTS):
            request = llm._completer.complete(
                prompt, params, field="token_ids", request_id=f"replay-{i}", timeout_s=None
            )
            llm.engine.submit(replace(request, output_token_ids=tuple(tokens[i][:7]), num_replays=1))
            found = []
            while llm.engine.has_work:
                for update in llm.engine.step():
                    found += update.token_ids
            assert found == tokens[i][7:]


def test_beginnings_are_shared_where_their_numbers_are_the_same(tmp_path):
    """Prompts of 24 and 25 tokens with dynamic scaling beyond 16 begin alike and share nothing; those of 8 and 12 do.
    Blocks of 4 tokens: of 12 tokens with 8 computed before, all but the last block are found."""
    write_checkpoint(tmp_path / "model", CONFIGS["qwen2, dynamic"], seed=3)
    with llm_for(tmp_path / "model") as llm:
        for length, found in ((24, 0), (25, 0), (25, 24), (8, 0), (12, 8), (16, 12)):
            batches = watch_batches(llm)
            llm.generate([list(range(60, 60 + length))], SamplingParams(temperature=0, max_tokens=1))
            assert sum(batch.num_reused_tokens for batch in batches) == found, length


def test_an_override_is_the_same_as_the_config_that_has_it(tmp_path):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    write_checkpoint(tmp_path / "plain", dense(max_position_embeddings=16, rope_theta=5000.0), seed=3)
    write_checkpoint(tmp_path / "yarn", dense(max_position_embeddings=16, rope_theta=5000.0, rope_scaling=yarn), seed=3)
    logits, tokens = answer_of(tmp_path / "yarn", PROMPTS[2])
    with llm_for(tmp_path / "plain", rope_scaling=yarn) as llm:
        assert llm.info.max_model_len == 64
        torch.testing.assert_close(llm.logits(PROMPTS[2]), logits, atol=1e-4, rtol=0)
        assert tokens_of(llm, [PROMPTS[2]]) == [tokens]
    with pytest.raises(SetupError, match=r"context has 16 tokens: rope_scaling .* stretches it"):
        llm_for(tmp_path / "plain", max_model_len=17)
    with llm_for(tmp_path / "yarn", rope_scaling={"rope_type": "default"}) as llm:
        assert llm.info.max_model_len == 16
    with pytest.raises(CheckpointError, match=r"with rope_scaling {'rope_type': 'ntk'}.* is not served: default, "):
        llm_for(tmp_path / "plain", rope_scaling={"rope_type": "ntk"})
    with pytest.raises(SetupError, match="rope_scaling is 'yarn', an object with names is needed"):
        llm_for(tmp_path / "plain", rope_scaling="yarn")
