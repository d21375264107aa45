"""Results other than tokens against transformers, in float32: computed beside generation, in chunks, from a cache."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from configs import NUM_TOKENS, PROMPTS
from parity_tools import logprobs_of

from cluster import LLM, SamplingParams
from cluster.engine import outcomes
from cluster.types import SAMPLING_DEFAULTS, EngineRequest

GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True).with_defaults(SAMPLING_DEFAULTS)
WAYS = {
    "as it is": {},
    "prompts in chunks of 7": {"max_num_batched_tokens": 7},
    "prompts that are cached": {"block_size": 4},
}


@pytest.fixture(scope="module")
def hidden_of():
    """The hidden states [T, H] that transformers gives each prompt."""
    made = {}

    def get(oracle):
        if oracle.model_dir not in made:
            from transformers import AutoModel

            model = AutoModel.from_pretrained(oracle.model_dir, dtype=torch.float32, attn_implementation="eager").eval()
            with torch.inference_mode():
                made[oracle.model_dir] = [model(torch.tensor([prompt])).last_hidden_state[0] for prompt in PROMPTS]
        return made[oracle.model_dir]

    return get


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def llm_for(oracle, **options):
    return LLM(
        oracle.model_dir, dtype="float32", device="cpu", skip_tokenizer=True, num_expert_shards=2,
        **{"kv_cache_bytes": 1 << 22, **options},
    )  # fmt: skip


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=pytest.mark.slow if options else []) for way, options in WAYS.items()]
)
def test_log_probabilities_and_embeddings_are_those_of_transformers(oracle, hidden_of, way):
    hidden = hidden_of(oracle)
    with llm_for(oracle, **WAYS[way]) as llm:
        if way == "prompts that are cached":
            llm.generate(PROMPTS, GREEDY)
        for prompt, logits, found in zip(PROMPTS, oracle.logits, llm.prompt_logprobs(PROMPTS), strict=True):
            assert found.prompt_token_ids == tuple(prompt)
            close(found.logprobs, logprobs_of(prompt, logits))
        for rows, found in zip(hidden, llm.embed(PROMPTS, pooling="last", normalize=False), strict=True):
            close(found.embedding, rows[-1])
        for rows, found in zip(hidden, llm.embed(PROMPTS, pooling="mean"), strict=True):
            close(found.embedding, F.normalize(rows.mean(dim=0), dim=0))
        assert llm.engine.blocks.num_used == 0


def test_all_kinds_of_results_come_out_of_the_same_steps_as_tokens(oracle, hidden_of):
    """A budget of 16 tokens a step: prompts in chunks beside decoding, and five kinds of results in one batch."""
    hidden = hidden_of(oracle)
    kinds = ("tokens", "token_logprobs", "last_hidden_state", "mean_hidden_state", "hidden_states")
    with llm_for(oracle, max_num_batched_tokens=16, block_size=4) as llm:
        tokens, numbers, kinds_of_steps = {}, {}, []
        run = llm.engine.runner.run
        llm.engine.runner.run = lambda batch: (
            kinds_of_steps.append({s.sequence.request.wants for s in batch.scheduled}) or run(batch)
        )
        for wants in kinds:
            for number, prompt in enumerate(PROMPTS):
                llm.engine.submit(
                    EngineRequest(
                        request_id=f"{wants} {number}", prompt_token_ids=tuple(prompt), params=GREEDY, wants=wants
                    )
                )
        while llm.engine.has_work:
            for update in llm.engine.step():
                assert update.error is None
                tokens.setdefault(update.request_id, []).extend(update.token_ids)
                numbers[update.request_id] = update.numbers
    assert max(map(len, kinds_of_steps)) >= 4
    for number, (prompt, logits, rows) in enumerate(zip(PROMPTS, oracle.logits, hidden, strict=True)):
        found = SimpleNamespace(**{k: torch.from_numpy(numbers[f"{k} {number}"].array()) for k in kinds[1:]})
        assert tokens[f"tokens {number}"] == oracle.token_ids[number]
        close(found.token_logprobs, logprobs_of(prompt, logits))
        close(found.last_hidden_state, rows[-1])
        close(found.mean_hidden_state, rows.mean(dim=0))
        close(found.hidden_states, rows)


def test_no_more_logits_than_of_a_few_rows_are_held_at_a_time(oracle_of, monkeypatch):
    oracle = oracle_of("qwen2, released key style")
    monkeypatch.setattr(outcomes, "LOGIT_ROWS", 3)
    with llm_for(oracle) as llm:
        held, logits_of = [], llm.engine.runner.model.logits
        llm.engine.runner.model.logits = lambda rows, *changes: held.append(len(rows)) or logits_of(rows, *changes)
        for prompt, logits, found in zip(PROMPTS, oracle.logits, llm.prompt_logprobs(PROMPTS), strict=True):
            close(found.logprobs, logprobs_of(prompt, logits))
    assert max(held) == 3
    assert sum(held) == sum(len(prompt) - 1 for prompt in PROMPTS)
