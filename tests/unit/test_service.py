import asyncio
import logging
import math
from contextlib import suppress

import pytest
from serving_fakes import (
    HELLO,
    IM_END,
    IM_START,
    MAX_MODEL_LEN,
    VOCAB_SIZE,
    EchoBackend,
    FakeMetrics,
    TickingClock,
    byte_ids,
    make_service,
    says,
    write_tokenizer,
)

from cluster.errors import ClusterError, DeadlineExceeded, InvalidRequest, Overloaded, RequestCancelled, Unavailable
from cluster.serving.admission.admission import Admission
from cluster.serving.text.prompts import Prompt
from cluster.serving.text.tokenizer import Tokenizer
from cluster.serving.tracking import MAX_REQUEST_ID_CHARS
from cluster.types import Logprobs, SamplingParams, SequenceUpdate, Usage

GREEDY = SamplingParams(temperature=0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def backend():
    return EchoBackend()


@pytest.fixture
def service(tokenizer, backend):
    return make_service(tokenizer, backend)


def prepare(service, prompt, params=GREEDY):
    return asyncio.run(service.prepare(prompt, params))


def generate(service, prompt, params=GREEDY, **options):
    return asyncio.run(service.generate(prompt, params, **options))


def stream(service, prompt, params=GREEDY, **options):
    async def collect():
        return [delta async for delta in service.stream(prompt, params, **options)]

    return asyncio.run(collect())


def update(*token_ids, finish_reason=None, **fields):
    return SequenceUpdate(request_id="r", token_ids=token_ids, finish_reason=finish_reason, **fields)


# From a prompt to a request


def test_each_kind_of_prompt_is_tokenized(service):
    assert prepare(service, Prompt(text="hello")).prompt_token_ids == (HELLO,)
    assert prepare(service, Prompt(token_ids=[3, 299])).prompt_token_ids == (3, 299)
    chat = Prompt(chat=says("hello"))
    expected = (
        IM_START, *byte_ids("user\n"), HELLO, IM_END, *byte_ids("\n"), IM_START, *byte_ids("assistant\n"),
    )  # fmt: skip
    assert prepare(service, chat).prompt_token_ids == expected


def test_defaults_come_from_the_checkpoint_then_from_the_project(tokenizer, backend):
    service = make_service(tokenizer, backend, defaults=SamplingParams(temperature=0.7, top_k=20))
    params = prepare(service, Prompt(token_ids=[1, 2]), SamplingParams(top_k=5)).params
    assert (params.temperature, params.top_k, params.top_p, params.repetition_penalty) == (0.7, 5, 1.0, 1.0)
    assert params.seed is None


@pytest.mark.parametrize(("default", "expected"), [(None, MAX_MODEL_LEN - 4), (10, 10), (1000, MAX_MODEL_LEN - 4)])
def test_max_tokens_defaults_to_the_checkpoints_within_the_context(tokenizer, backend, default, expected):
    service = make_service(tokenizer, backend, defaults=SamplingParams(max_tokens=default))
    assert prepare(service, Prompt(token_ids=[1] * 4)).params.max_tokens == expected


def test_prompt_and_max_tokens_may_fill_the_context(service):
    params = SamplingParams(max_tokens=MAX_MODEL_LEN - 4)
    assert prepare(service, Prompt(token_ids=[1] * 4), params).params.max_tokens == MAX_MODEL_LEN - 4


# Refusals


@pytest.mark.parametrize(
    ("prompt", "params", "field", "words"),
    [
        (lambda: Prompt(text=""), {}, "text", ["text is empty"]),
        (lambda: Prompt(token_ids=[]), {}, "token_ids", ["token_ids is empty"]),
        (Prompt, {}, "input", ["input is empty"]),
        (lambda: Prompt(text="a", token_ids=[1]), {}, "input", ["text and token_ids"]),
        (lambda: Prompt(token_ids=[1, 300]), {}, "token_ids", ["300", "position 1", "299"]),
        (lambda: Prompt(token_ids=[-1]), {}, "token_ids", ["-1", "position 0"]),
        (lambda: Prompt(token_ids=[1] * 64), {}, "token_ids", ["64 tokens", "63", "context of 64"]),
        (lambda: Prompt(text="a" * 70), {}, "text", ["70 tokens"]),
        (lambda: Prompt(token_ids=[1] * 4), {"max_tokens": 61}, "max_tokens", ["61", "4 tokens", "65", "64", "60 fit"]),
        (lambda: Prompt(token_ids=[1] * 4), {"min_tokens": 61}, "min_tokens", ["61", "60"]),
        (lambda: Prompt(text="a"), {"stop_token_ids": [5, 300]}, "stop_token_ids", ["300", "position 1"]),
        (lambda: Prompt(text="a\ud800"), {}, "text", ["not valid UTF-8"]),
        (lambda: Prompt(text="a"), {"temperature": -1}, "temperature", ["-1", "at least 0"]),
        (lambda: Prompt(text="a"), {"temperature": math.nan}, "temperature", ["nan"]),
        (lambda: Prompt(text="a"), {"top_p": 0.0}, "top_p", ["above 0"]),
        (lambda: Prompt(text="a"), {"top_p": 1.5}, "top_p", ["1.5", "at most 1"]),
        (lambda: Prompt(text="a"), {"top_k": -1}, "top_k", ["-1"]),
        (lambda: Prompt(text="a"), {"min_p": 2}, "min_p", ["2"]),
        (lambda: Prompt(text="a"), {"repetition_penalty": 0}, "repetition_penalty", ["0"]),
        (lambda: Prompt(text="a"), {"presence_penalty": 3}, "presence_penalty", ["3", "2"]),
        (lambda: Prompt(text="a"), {"frequency_penalty": -3}, "frequency_penalty", ["-3", "-2"]),
        (lambda: Prompt(text="a"), {"seed": -1}, "seed", ["-1"]),
        (lambda: Prompt(text="a"), {"max_tokens": 0}, "max_tokens", ["0", "1"]),
        (lambda: Prompt(text="a"), {"max_tokens": 2, "min_tokens": 3}, "min_tokens", ["3", "2"]),
        (lambda: Prompt(text="a"), {"logprobs": 21}, "logprobs", ["21", "20"]),
        (lambda: Prompt(text="a"), {"stop": ["a"] * 17}, "stop", ["17", "16"]),
        (lambda: Prompt(text="a"), {"stop": [""]}, "stop", ["0 characters", "256"]),
    ],
)  # fmt: skip
def test_a_bad_request_is_refused_with_field_value_and_limit(service, backend, prompt, params, field, words):
    with pytest.raises(InvalidRequest) as refusal:
        generate(service, prompt(), SamplingParams(**params))
    assert refusal.value.field == field
    assert all(word in str(refusal.value) for word in words), str(refusal.value)
    assert not backend.requests


def test_a_chat_template_that_raises_is_refused(tmp_path, backend):
    template = "{{ raise_exception('system first') }}"
    service = make_service(Tokenizer(write_tokenizer(tmp_path, chat_template=template)), backend)
    with pytest.raises(InvalidRequest, match="system first"):
        generate(service, Prompt(chat=says("a")))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"request_id": "a b"}, "request_id"),
        ({"request_id": "é"}, "request_id"),
        ({"request_id": "x" * (MAX_REQUEST_ID_CHARS + 1)}, "request_id"),
        ({"timeout_s": 0.0}, "timeout_ms"),
        ({"timeout_s": math.nan}, "timeout_ms"),
    ],
)
def test_a_bad_id_or_budget_is_refused(service, options, field):
    with pytest.raises(InvalidRequest) as refusal:
        generate(service, Prompt(text="a"), **options)
    assert refusal.value.field == field


def test_a_draining_service_sends_new_requests_elsewhere(service):
    service.admission.drain()
    assert service.admission.draining
    with pytest.raises(Unavailable, match="send the request to another one"):
        generate(service, Prompt(text="a"))


# Answers


def test_generate_returns_the_echo_without_eos_text(service, backend):
    """The echo of h, i is h, i and EOS: the tokens have the EOS, the text does not."""
    output = generate(service, Prompt(text="hi"))
    assert output.text == "hi"
    assert output.token_ids == (*byte_ids("hi"), IM_END)
    assert (output.finish_reason, output.request_id) == ("stop", "generated-1")
    assert output.usage == Usage(prompt_tokens=2, completion_tokens=3)
    assert backend.closed == []


def test_stream_ends_with_reason_and_usage(service):
    deltas = stream(service, Prompt(text="hi"), SamplingParams(max_tokens=2))
    assert [(d.text, d.token_ids) for d in deltas] == [("h", byte_ids("h")), ("i", byte_ids("i"))]
    assert [d.finish_reason for d in deltas] == [None, "length"]
    assert [d.usage for d in deltas] == [None, Usage(prompt_tokens=2, completion_tokens=2)]


def test_stream_never_shows_half_a_character(service):
    texts = [d.text for d in stream(service, Prompt(text="é€"))]
    assert texts == ["", "é", "", "", "€", ""]


def test_logprobs_go_with_their_tokens(service):
    output = generate(service, Prompt(token_ids=[5, 6]), SamplingParams(logprobs=1))
    assert output.logprobs[0] == Logprobs(5, -5.0, ((5, -5.0),))
    assert len(output.logprobs) == len(output.token_ids) == 3


def test_a_stop_string_ends_the_sequence_at_the_engine(tokenizer):
    """ "abSTOPcd" comes 4 tokens at a time: the second update ends "STOP" with its second token, the third never comes.

    The text ends before the stop string; tokens and log-probabilities end with its last one: 6 of each.
    """
    backend = EchoBackend(step=4)
    service = make_service(tokenizer, backend)
    output = generate(service, Prompt(text="abSTOPcdef"), SamplingParams(stop="STOP", logprobs=0))
    assert output.text == "ab"
    assert output.token_ids == byte_ids("abSTOP")
    assert len(output.logprobs) == 6
    assert output.finish_reason == "stop"
    assert backend.closed == ["generated-1"]
    assert service.admission.num_running == 0


def test_the_sequence_is_closed_before_the_last_delta_goes_out(tokenizer):
    async def scenario():
        backend = EchoBackend()
        service = make_service(tokenizer, backend)
        deltas = service.stream(Prompt(text="ab!cd"), SamplingParams(stop="!"))
        while (await anext(deltas)).finish_reason is None:
            pass
        assert backend.closed == ["generated-1"]
        await deltas.aclose()

    asyncio.run(scenario())


def test_a_stop_string_that_never_ends_comes_out_with_the_end(service):
    assert generate(service, Prompt(text="abST"), SamplingParams(stop="STOP")).text == "abST"


def test_a_stop_token_has_no_text(tokenizer):
    """The engine ends at "b" because of stop_token_ids; with "length" the same token would be text."""
    ab = byte_ids("ab")
    params = SamplingParams(stop_token_ids=ab[1:])
    backend = EchoBackend(script=[update(*ab, finish_reason="stop")])
    output = generate(make_service(tokenizer, backend), Prompt(text="x"), params)
    assert (output.text, output.token_ids) == ("a", ab)
    backend = EchoBackend(script=[update(*ab, finish_reason="length")])
    assert generate(make_service(tokenizer, backend), Prompt(text="x"), params).text == "ab"


def test_generate_is_the_sum_of_the_stream(service):
    prompt, params = Prompt(text="hello €é hello"), SamplingParams(logprobs=0)
    output, deltas = generate(service, prompt, params), stream(service, prompt, params)
    assert output.text == "".join(d.text for d in deltas)
    assert output.token_ids == tuple(t for d in deltas for t in d.token_ids)
    assert output.logprobs == tuple(p for d in deltas for p in d.logprobs)


def test_tokenize_and_detokenize(service):
    assert asyncio.run(service.tokenize(Prompt(text="hello"))) == [HELLO]
    assert asyncio.run(service.tokenize(Prompt(text=""))) == []
    assert asyncio.run(service.detokenize([HELLO, IM_END])) == "hello"
    assert asyncio.run(service.detokenize([IM_END], skip_special_tokens=False)) == "<|im_end|>"
    with pytest.raises(InvalidRequest, match=f"{VOCAB_SIZE} at position 0"):
        asyncio.run(service.detokenize([VOCAB_SIZE]))
    with pytest.raises(InvalidRequest, match="tokens already"):
        asyncio.run(service.tokenize(Prompt(token_ids=[1])))


# How it ends otherwise


@pytest.mark.parametrize(
    ("script", "error", "outcome"),
    [
        ([update(1), update(finish_reason="error", error=Unavailable("no shard"))], Unavailable, "unavailable"),
        ([update(1), update(finish_reason="cancelled")], RequestCancelled, "cancelled"),
        ([update(1), update(finish_reason="error")], ClusterError, "internal"),
        ([update(1)], ClusterError, "internal"),
        ([update(1), KeyError("bug")], KeyError, "internal"),
    ],
)  # fmt: skip
def test_a_failed_sequence_raises_and_is_counted(tokenizer, script, error, outcome):
    metrics = FakeMetrics()
    service = make_service(tokenizer, EchoBackend(script=script), metrics=metrics)
    with pytest.raises(error):
        generate(service, Prompt(text="a"))
    assert metrics.named("finished") == [(outcome,)]
    assert metrics.named("end_to_end") == []
    assert service.admission.num_running == 0


def test_cancelling_a_request_closes_its_sequence(tokenizer):
    async def scenario():
        backend, metrics = EchoBackend(hang=True), FakeMetrics()
        service = make_service(tokenizer, backend, metrics=metrics)
        task = asyncio.create_task(service.generate(Prompt(text="a"), GREEDY, request_id="mine"))
        await backend.reached.wait()
        assert service.admission.num_running == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert backend.closed == ["mine"]
        assert service.admission.num_running == 0
        assert metrics.named("finished") == [("cancelled",)]

    asyncio.run(scenario())


def test_closing_a_stream_half_way_closes_its_sequence(tokenizer, backend):
    async def scenario():
        metrics = FakeMetrics()
        service = make_service(tokenizer, backend, metrics=metrics)
        deltas = service.stream(Prompt(text="abc"), GREEDY)
        await anext(deltas)
        assert (backend.closed, service.admission.num_running) == ([], 1)
        await deltas.aclose()
        assert (backend.closed, service.admission.num_running) == (["generated-1"], 0)
        assert metrics.named("finished") == [("cancelled",)]

    asyncio.run(scenario())


def test_a_stream_closed_after_its_last_delta_is_a_success(service):
    async def scenario():
        metrics = service._tracker._metrics
        deltas = service.stream(Prompt(text="a"), SamplingParams(max_tokens=1))
        assert (await anext(deltas)).finish_reason == "length"
        await deltas.aclose()
        assert metrics.named("finished") == [("length",)]

    asyncio.run(scenario())


def test_a_request_over_its_budget_fails_and_closes_its_sequence(tokenizer):
    backend, metrics = EchoBackend(hang=True), FakeMetrics()
    service = make_service(tokenizer, backend, metrics=metrics)
    with pytest.raises(DeadlineExceeded, match=r"time budget of 0\.01 s"):
        generate(service, Prompt(text="a"), timeout_s=0.01)
    assert backend.closed == ["generated-1"]
    assert metrics.named("finished") == [("deadline_exceeded",)]


def test_the_engine_gets_the_rest_of_the_budget(tokenizer, backend):
    """The clock adds 1 s a reading: arrival is reading 1, preparing starts at 2, the rest is counted at 3."""
    service = make_service(tokenizer, backend, clock=TickingClock(tick=1.0))
    generate(service, Prompt(text="a"), timeout_s=60.0)
    assert backend.requests[0].timeout_s == 58.0


def test_a_budget_spent_before_the_engine_never_reaches_it(tokenizer, backend):
    service = make_service(tokenizer, backend, clock=TickingClock(tick=1.0))
    with pytest.raises(DeadlineExceeded):
        generate(service, Prompt(text="a"), timeout_s=1.5)
    assert not backend.requests


def test_metrics_count_tokens_and_times(tokenizer):
    """Prompt "abc", 2 tokens an update: updates (a, b) and (c, EOS). The clock adds 1 s a reading.

    Readings: 101 arrival, 102 first update, 103 second update (1 s for two tokens), 104 end.
    """
    metrics = FakeMetrics()
    service = make_service(tokenizer, EchoBackend(step=2), metrics=metrics, clock=TickingClock(tick=1.0))
    generate(service, Prompt(text="abc"))
    assert metrics.named("started") == [()]
    assert metrics.named("prompt_tokens") == [(3,)]
    assert metrics.named("generated_tokens") == [(2,), (2,)]
    assert metrics.named("first_token") == [(1.0,)]
    assert metrics.named("inter_token") == [(1.0, 2)]
    assert metrics.named("end_to_end") == [(3.0,)]
    assert metrics.named("finished") == [("stop",)]


@pytest.mark.parametrize(
    ("error", "level"),
    [
        (None, logging.INFO),
        (Unavailable("a shard is gone"), logging.WARNING),
        (RuntimeError("a bug"), logging.WARNING),
        (InvalidRequest("a client's fault", "text"), logging.INFO),
        (Overloaded("full", 1.0), logging.DEBUG),
    ],
)
def test_only_requests_that_fail_by_our_fault_have_a_line_that_is_not_asked_for(tokenizer, caplog, error, level):
    """An ingress shows INFO where log_requests is on, else WARNING."""

    class Backend(EchoBackend):
        async def generate(self, request):
            if error is not None:
                raise error
            async for update in super().generate(request):
                yield update

    service = make_service(tokenizer, Backend())
    with caplog.at_level(logging.DEBUG, logger="cluster"), suppress(Exception):
        generate(service, Prompt(text="abc"))
    (record,) = [record for record in caplog.records if "ended with" in record.getMessage()]
    assert (record.name, record.levelno) == ("cluster.requests", level)


def test_each_request_leaves_one_log_line_with_its_id(service, caplog):
    with caplog.at_level(logging.DEBUG, logger="cluster"):
        generate(service, Prompt(text="abc"), request_id="mine")
    (record,) = caplog.records
    assert "'mine' ended with stop" in record.getMessage()
    assert "3 prompt tokens, 4 generated" in record.getMessage()


# Too many at once


async def started(service, client):
    """A stream that hangs before its first token; returns its task."""
    stream = service.stream(Prompt(text="hello"), GREEDY, client=client)
    task = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)
    return task


def test_a_request_without_room_is_refused_before_it_is_read(tokenizer):
    service = make_service(tokenizer, EchoBackend(hang=True), room=2)

    async def run():
        tasks = [await started(service, client) for client in ("a", "b")]
        with pytest.raises(Overloaded, match="try again in") as refused:
            await service.generate(Prompt(token_ids=[-1]), GREEDY, client="c")  # nor is its prompt read
        for task in tasks:
            task.cancel()
        return refused.value.retry_after_s

    assert asyncio.run(run()) >= 0.1
    assert service.admission.num_running == 0


def test_a_client_with_few_requests_is_heard_where_another_has_many(tokenizer):
    service = make_service(tokenizer, EchoBackend(hang=True), room=3)

    async def run():
        tasks = [await started(service, "greedy") for _ in range(3)]
        with pytest.raises(Overloaded):
            await service.generate(Prompt(text="hello"), GREEDY, client="greedy")
        tasks.append(await started(service, "modest"))
        assert service.admission.num_running == 4
        for task in tasks:
            task.cancel()

    asyncio.run(run())


def test_a_client_has_no_more_streams_at_a_time_than_it_may(tokenizer):
    service = make_service(tokenizer, EchoBackend(hang=True), max_streams_per_client=2)

    async def run():
        tasks = [await started(service, client) for client in ("a", "a", "b")]
        with pytest.raises(Overloaded, match=r"has 2 requests running, as many as it may: try again in \d"):
            await service.generate(Prompt(text="hello"), GREEDY, client="a")
        tasks.append(await started(service, "b"))
        tasks[0].cancel()
        await asyncio.wait(tasks[:1])
        tasks.append(await started(service, "a"))
        assert service.admission.num_running == 4
        for task in tasks:
            task.cancel()

    asyncio.run(run())


def test_a_clients_tokens_are_charged_when_its_request_ends_however_it_does(tokenizer):
    """ "abc" is 3 tokens, answered by 3 and EOS: 7. Left after the first piece: 3 and 1. Refused: none."""
    spent = []

    class Charged(Admission):
        def spend(self, client, num_tokens):
            spent.append((client, num_tokens))

    service = make_service(tokenizer, EchoBackend(), admission=Charged())

    async def leave():
        deltas = service.stream(Prompt(text="abc"), GREEDY, client="b")
        await anext(deltas)
        await deltas.aclose()

    generate(service, Prompt(text="abc"), client="a")
    asyncio.run(leave())
    with pytest.raises(InvalidRequest):
        generate(service, Prompt(text=""), client="c")
    assert spent == [("a", 7), ("b", 4), ("c", 0)]
