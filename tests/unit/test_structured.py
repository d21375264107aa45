"""Answers in a form, from the demo checkpoint in one process: random text, so that the masks do all of the work."""

import asyncio
import json
import re
import threading
from dataclasses import replace

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import LLM, SamplingParams
from cluster.client.grpc_client import sampling_message
from cluster.errors import InvalidRequest, ReplicaUnavailable
from cluster.grammar.state import GrammarState
from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.serving.grpc.messages import to_sampling_params
from cluster.serving.replay import ReplayingBackend
from cluster.serving.text.prompts import Prompt
from cluster.serving.update_queue import merge_updates
from cluster.structured import StructuredOutputsParams
from cluster.types import EngineRequest, SequenceUpdate


@pytest.fixture(scope="module")
def llm(demo_checkpoint):
    with LLM(demo_checkpoint, dtype="float32", kv_cache_bytes=4 << 20) as made:
        yield made


RANDOM = SamplingParams(temperature=1, top_p=1, top_k=0, repetition_penalty=1, max_tokens=800)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "bb", None]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def ask(llm, *, seed=0, params=RANDOM, num=1, **form):
    every = [replace(params, seed=seed + i, structured_outputs=StructuredOutputsParams(**form)) for i in range(num)]
    return llm.generate(["Tell me"] * num, every)


LEAVES = st.sampled_from(
    [
        {"type": "boolean"}, {"type": "null"}, {"type": "integer", "minimum": -9, "maximum": 99},
        {"enum": ["x", 1, None]}, {"type": "string", "maxLength": 4}, {"const": {"a": [1]}},
    ]
)  # fmt: skip


def _nested(inner):
    arrays = st.builds(lambda items: {"type": "array", "items": items, "minItems": 1, "maxItems": 2}, inner)
    objects = st.builds(
        lambda properties: {
            "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False,
        },
        st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=2),
    )  # fmt: skip
    return arrays | objects | st.builds(lambda one, other: {"anyOf": [one, other]}, inner, inner)


@settings(max_examples=15, deadline=None)
@given(schema=st.recursive(LEAVES, _nested, max_leaves=4), seed=st.integers(0, 2**30))
def test_answers_validate_against_their_schema(llm, schema, seed):
    [output] = ask(llm, seed=seed, json=schema)
    assert output.finish_reason == "stop"
    jsonschema.validate(json.loads(output.text), schema)


@pytest.mark.parametrize(
    "pattern", ["[a-f]{3,9}-[0-9]{2}", "(?:ab|c{2,3})+d", "é[à-ü]{1,3}", r"\d{3}/[A-Z]\w?", "never|ever"]
)
def test_answers_match_their_pattern(llm, pattern):
    for output in ask(llm, num=4, regex=pattern):
        assert output.finish_reason == "stop" or len(output.token_ids) == 800
        assert output.finish_reason == "length" or re.fullmatch(pattern, output.text)


def test_choices_grammars_and_objects(llm):
    assert {output.text for output in ask(llm, num=6, choice=["yes", "no", 'a "b"\n'])} <= {"yes", "no", 'a "b"\n'}
    for grammar in ('start: "x" NUMBER\nNUMBER: /[0-9]{1,4}/', 'root ::= "x" [0-9] [0-9]'):
        assert all(re.fullmatch("x[0-9]{1,4}", output.text) for output in ask(llm, num=3, grammar=grammar))
    [output] = ask(llm, json_object=True, params=replace(RANDOM, max_tokens=30))
    assert output.text.startswith("{")


SETTINGS = {
    "greedy": {"temperature": 0},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.2},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    "an end that is not allowed yet": {"min_tokens": 30},
    "no end": {"ignore_eos": True},
    "biases": {"logit_bias": {7: 100.0, 64: 5.0}},
}


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_every_way_to_choose_keeps_to_the_form(llm, changes, kernels, monkeypatch):
    if kernels == "torch":
        monkeypatch.setattr("cluster.kernels.sampling.choose.native", lambda: None)
    for output in ask(llm, num=2, json=PERSON, params=replace(RANDOM, **changes)):
        assert output.finish_reason == "stop"
        jsonschema.validate(json.loads(output.text), PERSON)


@pytest.mark.parametrize("bias", [{}, {64: 5.0, 65: -3.0, 7: 100.0}])
def test_log_probabilities_are_those_among_the_allowed_tokens(llm, bias):
    """Worked out from the model's logits: the softmax over the tokens that may begin, or go on with, a or bb."""
    [output] = ask(llm, choice=["a", "bb"], params=replace(RANDOM, logprobs=5, logit_bias=bias))
    first = output.logprobs[0]
    encode = llm._tokenizer.encode
    allowed = [*encode("a"), *encode("b"), *encode("bb")]
    allowed = [i for i in dict.fromkeys(allowed) if llm._tokenizer.token_bytes(i) in (b"a", b"b", b"bb")]
    expected = llm.logits(list(output.prompt_token_ids))[-1][allowed].log_softmax(dim=0)
    assert {token_id for token_id, _ in first.top} == set(allowed)
    torch.testing.assert_close(torch.tensor([dict(first.top)[i] for i in allowed]), expected, atol=1e-4, rtol=0)
    assert first.logprob == dict(first.top)[first.token_id]


def test_a_request_without_a_form_is_answered_as_if_it_were_alone(llm):
    plain = replace(RANDOM, seed=7, max_tokens=20, logprobs=3)
    [alone] = llm.generate(["Tell me"], plain)
    form = StructuredOutputsParams(json=PERSON)
    beside = llm.generate(["Tell me"] * 3, [replace(RANDOM, seed=1, structured_outputs=form), plain, plain])
    for output in beside[1:]:
        assert output.token_ids == alone.token_ids
        for mine, its in zip(output.logprobs, alone.logprobs, strict=True):
            assert dict(mine.top) == pytest.approx(
                dict(its.top), abs=1e-4
            )  # a product's sums depend on the rows beside it


def test_a_sequence_that_lost_its_blocks_goes_on_in_its_form(demo_checkpoint):
    """The cache holds two of the six answers, so that some are computed again; each is as if it were alone."""
    with LLM(demo_checkpoint, dtype="float32", kv_cache_bytes=96 << 10, block_size=4) as small:
        preempted = []
        small.engine.metrics.preempted = lambda: preempted.append(1)
        params = replace(RANDOM, max_tokens=60)
        together = ask(small, num=6, json=PERSON, params=params)
        assert preempted
        for seed, output in enumerate(together):
            [alone] = ask(small, seed=seed, json=PERSON, params=params)
            assert output.token_ids == alone.token_ids


def test_a_request_goes_on_at_another_engine_in_the_state_of_its_grammar(llm):
    """Whichever token its first engine dies after."""
    form = StructuredOutputsParams(json=PERSON)
    request = llm._request(llm_prompt("Tell me"), replace(RANDOM, seed=3, structured_outputs=form))
    whole = run(llm, request)
    for num in range(1, len(whole), 9):
        resumed = replace(request, request_id=f"again-{num}", output_token_ids=tuple(whole[:num]), num_replays=1)
        assert run(llm, resumed) == whole[num:]
    ended = replace(request, request_id="ended", output_token_ids=tuple(whole), num_replays=1)
    assert run(llm, ended) == []


def test_a_replay_carries_the_form_and_the_tokens(llm):
    class Dying:
        """The first attempt brings one token and dies; the others are an engine's."""

        def __init__(self):
            self.seen = []

        async def generate(self, asked):
            self.seen.append(asked)
            tokens = run(llm, asked)
            if len(self.seen) < 4:
                yield SequenceUpdate(request_id=asked.request_id, token_ids=tuple(tokens[:2]), constrained=True)
                raise ReplicaUnavailable("it died")
            yield SequenceUpdate(request_id=asked.request_id, token_ids=tuple(tokens), finish_reason="stop")

    async def answer(request):
        replaying = ReplayingBackend(Dying(), max_replays=5, room_timeout_s=1)
        return [token async for update in replaying.generate(request) for token in update.token_ids]

    form = StructuredOutputsParams(json=PERSON)
    request = llm._request(llm_prompt("Tell me"), replace(RANDOM, seed=3, structured_outputs=form))
    assert asyncio.run(answer(replace(request, request_id="replayed"))) == run(llm, request)


def test_masks_are_computed_while_the_model_computes(llm, monkeypatch):
    """Each step's masks have begun before its forward pass ends."""
    begun, runner, waited = threading.Event(), llm.engine.runner, []
    compute, forward = GrammarState.mask, runner.forward

    def mask(state):
        begun.set()
        return compute(state)

    def wait_for_masks(scheduled):
        waited.append(begun.wait(30))
        begun.clear()
        return forward(scheduled)

    monkeypatch.setattr(GrammarState, "mask", mask)
    monkeypatch.setattr(runner, "forward", wait_for_masks)
    [output] = ask(llm, regex="[ab]{5}")
    assert waited == [True] * len(output.token_ids)


def test_a_bad_grammar_harms_its_request_alone(llm):
    """Here one that the check before cannot see: the engine's own thread finds it."""
    good, bad = (
        llm._request(llm_prompt("x"), replace(RANDOM, structured_outputs={"regex": "[ab]{3}"})) for _ in range(2)
    )
    bad = replace(bad, constraint=("json", '{"$ref":"#"}'))
    llm.engine.submit(bad)
    llm.engine.submit(good)
    ends = {}
    while llm.engine.has_work:
        ends |= {update.request_id: update for update in llm.engine.step() if update.finish_reason}
    assert isinstance(ends[bad.request_id].error, InvalidRequest)
    assert ends[good.request_id].finish_reason == "stop"


def test_a_request_may_be_cancelled_while_its_grammar_is_compiled(llm):
    request = llm._request(llm_prompt("x"), replace(RANDOM, structured_outputs={"regex": "[ab]{1,999}"}))
    llm.engine.submit(request)
    assert llm.engine.stats().waiting == 1
    llm.engine.cancel(request.request_id)
    assert [update.finish_reason for update in llm.engine.step()] == ["cancelled"]
    assert not llm.engine.has_work


@pytest.mark.parametrize("form", [{"regex": "(?=a)"}, {"json": {"type": "strin"}}, {"regex": "a", "choice": ["b"]}])
def test_a_broken_form_is_refused_before_anything_is_computed(llm, form):
    with pytest.raises(InvalidRequest):
        llm.generate(["x", "y"], [RANDOM, {"structured_outputs": form}])
    assert not llm.engine.has_work


def test_without_a_tokenizer_there_are_no_forms(demo_checkpoint):
    with (
        LLM(demo_checkpoint, skip_tokenizer=True, kv_cache_bytes=4 << 20) as bare,
        pytest.raises(InvalidRequest, match="skip_tokenizer"),
    ):
        bare.generate([[1, 2]], {"structured_outputs": {"regex": "a"}})


@pytest.mark.parametrize(
    "form",
    [{"json": PERSON}, {"json_object": True}, {"regex": "a+"}, {"choice": ["a", "b"]}, {"grammar": 'start: "a"'}],
    ids=str,
)
def test_a_form_survives_a_message(form):
    params = SamplingParams(seed=3, structured_outputs=form)
    assert to_sampling_params(pb.SamplingParams.FromString(sampling_message(params).SerializeToString())) == params


def test_updates_that_are_joined_for_a_slow_reader_still_keep_to_the_form():
    first = SequenceUpdate(request_id="r", token_ids=(1,), constrained=True)
    ended = SequenceUpdate(request_id="r", finish_reason="cancelled")
    assert merge_updates([first, first]).constrained
    assert merge_updates([first, ended]).constrained


def test_a_message_with_an_empty_form_is_refused():
    for message in (pb.StructuredOutputs(), pb.StructuredOutputs(json_object=False)):
        with pytest.raises(InvalidRequest, match="exactly one"):
            to_sampling_params(pb.SamplingParams(structured_outputs=message))


def llm_prompt(text):
    return Prompt(text=text)


def run(llm, request: EngineRequest) -> list[int]:
    """The engine's new tokens for a request."""
    llm.engine.submit(request)
    tokens: list[int] = []
    while llm.engine.has_work:
        for update in llm.engine.step():
            assert update.error is None, update.error
            tokens += update.token_ids
    return tokens
