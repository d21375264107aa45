"""The offline API, on the demo checkpoint in one process."""

import pytest
import torch

from cluster import LLM, SamplingParams
from cluster.errors import InvalidRequest, SetupError
from cluster.serving.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def llm(demo_checkpoint):
    with LLM(demo_checkpoint, dtype="float32", kv_cache_bytes=4 << 20) as made:
        yield made


GREEDY = SamplingParams(temperature=0, repetition_penalty=1.0, max_tokens=8, ignore_eos=True, logprobs=1)


def test_texts_and_token_ids_are_answered_in_their_order(llm, demo_checkpoint):
    tokenizer = Tokenizer(demo_checkpoint)
    by_text, by_ids = llm.generate(["a prompt", tokenizer.encode("a prompt")], GREEDY)
    assert by_text.prompt_token_ids == tuple(tokenizer.encode("a prompt"))
    assert by_text.token_ids == by_ids.token_ids
    assert by_text.text == tokenizer.decode(by_text.token_ids)
    assert (by_text.finish_reason, len(by_text.logprobs)) == ("length", 8)


def test_greedy_tokens_are_the_best_of_the_logits_and_so_are_their_logprobs(llm):
    [output] = llm.generate([[1, 2, 3]], GREEDY)
    logits = llm.logits([1, 2, 3, *output.token_ids])
    assert logits.shape == (11, llm.info.vocab_size)
    assert logits[2:-1].argmax(dim=-1).tolist() == list(output.token_ids)
    expected = logits[2:-1].log_softmax(dim=-1).max(dim=-1).values
    torch.testing.assert_close(torch.tensor([entry.logprob for entry in output.logprobs]), expected, atol=1e-4, rtol=0)


def test_each_prompt_may_have_its_own_parameters(llm):
    short, long = llm.generate(["a", "a"], [GREEDY, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)])
    assert (len(short.token_ids), len(long.token_ids)) == (8, 12)


def test_a_stop_string_ends_an_answer_and_frees_its_blocks(llm):
    [whole] = llm.generate(["stop me"], GREEDY)
    stop = whole.text[3:5]
    [output] = llm.generate(
        ["stop me"], SamplingParams(temperature=0, repetition_penalty=1, max_tokens=8, ignore_eos=True, stop=stop)
    )
    assert output.text == whole.text[: whole.text.index(stop)]
    assert output.finish_reason == "stop"
    assert len(output.token_ids) < 8
    llm.generate(["next"], GREEDY)
    assert llm.engine.blocks.num_used == 0


def test_defaults_come_from_the_checkpoints_generation_config(llm):
    """The demo's says 64 new tokens at most, and samples: two seeds differ."""
    one, other = llm.generate(
        ["a", "a"], [SamplingParams(seed=1, ignore_eos=True), SamplingParams(seed=2, ignore_eos=True)]
    )
    assert len(one.token_ids) == len(other.token_ids) == 64
    assert one.token_ids != other.token_ids


def test_a_lone_text_is_a_list_of_one(llm):
    assert len(llm.generate("a prompt", GREEDY)) == 1


@pytest.mark.parametrize("prompts", [[[]], [[99999]], [""], [[1] * 5000]])
def test_what_cannot_be_answered_is_refused_before_anything_runs(llm, prompts):
    with pytest.raises(InvalidRequest):
        llm.generate(prompts, GREEDY)
    assert not llm.engine.has_work


def test_another_transport_is_refused(demo_checkpoint):
    with pytest.raises(SetupError, match="'pigeon'"):
        LLM(demo_checkpoint, transport="pigeon")
