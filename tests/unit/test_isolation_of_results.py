"""An exception at one prompt's result of numbers ends that one, and changes neither other results nor answers."""

import pytest

from cluster import LLM, SamplingParams
from cluster.engine import runner as runner_module
from cluster.engine.outcomes import Gathering
from cluster.errors import RequestFailed
from cluster.open_answers import OpenAnswer, OpenResult
from cluster.outcome import Computed
from cluster.serving.text.prompts import Prompt

POISON = 666  # the first token of the prompt that meets the exception
PROMPTS = [[1, 2, 3], [POISON, *range(2, 30)], [7, 8, 9, 10, 11], [12, *range(30, 58)]]
POISONED = 3  # among answers and results in turn


class Bug(Exception):
    """An exception that nobody expected."""


def is_poisoned(sequence, num_before):
    """Late enough: when so many of its tokens are computed."""
    return sequence.token_ids[0] == POISON and sequence.num_computed_tokens >= num_before


def at_parts(monkeypatch, num_before):
    original = runner_module.parts_of

    def hooked(model, scheduled, hidden_states, chosen):
        if any(is_poisoned(scheduled[i].sequence, num_before) for i in chosen):
            raise Bug("parts_of")
        return original(model, scheduled, hidden_states, chosen)

    monkeypatch.setattr(runner_module, "parts_of", hooked)


def at_gathering(name):
    def install(monkeypatch, num_before):
        original = getattr(Gathering, name)

        def hooked(self, sequence, *arguments, **options):
            if is_poisoned(sequence, num_before):
                raise Bug(name)
            return original(self, sequence, *arguments, **options)

        monkeypatch.setattr(Gathering, name, hooked)

    return install


STAGES = {
    "computing parts": at_parts,
    "keeping a part": at_gathering("add"),
    "joining the parts": at_gathering("whole"),
}


@pytest.fixture(scope="module")
def llm(demo_checkpoint):
    """The poisoned prompt takes several steps, and so does another one beside it."""
    with LLM(
        demo_checkpoint, dtype="float32", kv_cache_bytes=4 << 20, block_size=4, max_num_batched_tokens=32,
        enable_prefix_caching=False,
    ) as made:  # fmt: skip
        yield made


def compute_beside_answers(llm, wants):
    """Numbers for all prompts and sampled answers to the same ones, in the same steps."""
    params = SamplingParams(temperature=0.9, seed=1, max_tokens=6, ignore_eos=True)
    results = [llm._completer.result(prompt, wants, field="prompt", request_id=llm._next_id()) for prompt in PROMPTS]
    answers = [llm._request(Prompt(token_ids=[9, *prompt]), params) for prompt in PROMPTS]
    # In turn, so that both halves of a step have results.
    pairs = zip(results, answers, strict=True)
    return llm._run(
        [one for result, asked in pairs for one in (OpenAnswer(asked, llm._answer(asked)), OpenResult(result))]
    )


def check_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        if isinstance(other, Computed):
            assert one.prompt_token_ids == other.prompt_token_ids
            assert one.numbers.array() == pytest.approx(other.numbers.array(), abs=1e-4)
        else:
            assert (one.token_ids, one.text) == (other.token_ids, other.text)


@pytest.mark.parametrize(("wants", "num_before"), [("token_logprobs", 0), ("mean_hidden_state", 8)])
@pytest.mark.parametrize("stage", STAGES)
def test_an_exception_at_one_result_ends_it_alone(llm, monkeypatch, stage, wants, num_before):
    expected = compute_beside_answers(llm, wants)
    with monkeypatch.context() as patched:
        STAGES[stage](patched, num_before)
        with pytest.raises(RequestFailed, match=r"request llm-\d+ met an exception of its own.*Bug") as met:
            compute_beside_answers(llm, wants)
    found = met.value.outputs
    assert found.pop(POISONED) is None
    check_same(found, expected[:POISONED] + expected[POISONED + 1 :])
    assert llm.engine.blocks.num_used == 0
    assert not llm.engine.has_work
    assert not llm.engine._gathering._parts  # a failed one is forgotten
    check_same(compute_beside_answers(llm, wants), expected)
