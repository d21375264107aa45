"""A long prompt, computed in chunks, and its answer: against transformers in float32, and in memory that stays."""

import random
from pathlib import Path

import pytest
import torch
from configs import dense

from cluster import LLM, SamplingParams
from cluster.bench.context import resident_bytes
from cluster.checkpoint.made.synthetic import write_checkpoint

TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "rope_theta": 1e6,
}  # fmt: skip
NUM_TOKENS = 8
SLIDING = {"use_sliding_window": True, "sliding_window": 1500, "max_window_layers": 1}


def ask_transformers(model_dir, prompt):
    """The logits behind the prompt, and a greedy answer with a cache. Fused attention needs no mask of all pairs."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None
    answer = model.generate(
        torch.tensor([prompt]), max_new_tokens=NUM_TOKENS, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return torch.cat(answer.logits), answer.sequences[0, len(prompt) :].tolist()


def check(model_dir: Path, length: int, chunk: int) -> list[int]:
    """Compares a prompt of so many tokens; returns the process's memory behind each of its chunks."""
    draw = random.Random(length)
    prompt = [draw.randrange(211) for _ in range(length)]
    sizes: list[int] = []
    options = {"kv_cache_bytes": 1 << 28, "max_num_seqs": 1, "max_num_batched_tokens": chunk}
    with LLM(model_dir, dtype="float32", device="cpu", skip_tokenizer=True, **options) as llm:
        runner = llm.engine.runner
        run, logits = runner.run, []

        def watched(batch):
            result = run(batch)
            if batch.num_tokens > 1:
                sizes.append(resident_bytes())
            return result

        project = runner.model.logits
        runner.run, runner.model.logits = watched, lambda hidden, _: logits.append(project(hidden)) or logits[-1]
        params = SamplingParams(temperature=0, repetition_penalty=1.0, max_tokens=NUM_TOKENS, ignore_eos=True)
        [output] = llm.generate([prompt], params)
    expected, tokens = ask_transformers(model_dir, prompt)
    torch.testing.assert_close(torch.cat(logits), expected, atol=1e-3, rtol=0)
    assert list(output.token_ids) == tokens
    return sizes


@pytest.mark.parametrize("changes", [{}, SLIDING], ids=["full", "a layer slides"])
def test_a_prompt_of_4_500_tokens_is_answered_as_by_transformers(tmp_path, changes):
    """In chunks of 3,000: the first has more pairs than one mask takes."""
    write_checkpoint(tmp_path / "model", dense(**TINY, **changes, max_position_embeddings=5000), seed=2)
    check(tmp_path / "model", 4500, 3000)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("length", "num_layers"), [(65536, 2), (131072, 1)])
def test_long_prompts_with_yarn_are_answered_as_by_transformers_in_memory_that_stays(tmp_path, length, num_layers):
    """One head of 16 numbers: pairs cost the time. Between the 8th and the last chunk of 2,048 tokens the process grows
    by what they write into the cache, 128 bytes a token and layer, 15 MB at most; a mask of one chunk's pairs
    alone would be 134 or 268 MB, its numbers four times that."""
    smaller = {"hidden_size": 16, "num_attention_heads": 1, "num_hidden_layers": num_layers}
    yarn = {"rope_type": "yarn", "factor": length / 32768 + 0.1, "original_max_position_embeddings": 32768}
    raw = dense(**TINY | smaller, max_position_embeddings=32768, rope_scaling=yarn)
    write_checkpoint(tmp_path / "model", raw, seed=2)
    sizes = check(tmp_path / "model", length, 2048)
    assert len(sizes) == length // 2048
    assert sizes[-1] - sizes[7] < (15 << 20) + (32 << 20)
