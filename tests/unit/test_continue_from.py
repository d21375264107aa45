"""Streams that go on where they broke off (`continue_from`): at every cut the rest is what the whole answer had."""

import asyncio
import json

import numpy as np
import pytest
from http_tools import MODEL, Front, events
from serving_fakes import HELLO, IM_END, byte_ids, make_service, write_tokenizer
from test_grpc_tool_calls import ANSWER as CALLS
from test_grpc_tool_calls import TOOLS, Context, chat

from cluster.errors import InvalidRequest, ReplicaUnavailable
from cluster.outcome import Numbers
from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.serving.grpc.context import StreamFailed
from cluster.serving.grpc.handlers import GrpcInferenceService
from cluster.serving.openai import completions
from cluster.serving.replay import ReplayingBackend
from cluster.serving.text.prompts import Prompt
from cluster.serving.text.tokenizer import Tokenizer
from cluster.types import Logprobs, SamplingParams, SequenceUpdate

ROOM = 512
LONG = SamplingParams(temperature=0, max_tokens=100)


class Writer:
    """Writes these tokens, one an update, from the one behind `output_token_ids` on; a log-probability is -token_id.

    lives: tokens after which an attempt ends with its replica.
    """

    def __init__(self, token_ids, lives=()):
        self.token_ids, self.lives, self.requests = token_ids, list(lives), []

    async def generate(self, request):
        self.requests.append(request)
        token_ids = self.token_ids[: request.params.max_tokens]
        reason = "stop" if token_ids[-1] == IM_END else "length"
        rest = token_ids[len(request.output_token_ids) :]
        if not rest:
            yield SequenceUpdate(request_id=request.request_id, finish_reason=reason)
        life = self.lives.pop(0) if self.lives else len(rest)
        for index, token in enumerate(rest):
            if index == life:
                raise ReplicaUnavailable("the attention replica died")
            yield SequenceUpdate(
                request_id=request.request_id,
                token_ids=(token,),
                logprobs=(Logprobs(token, -float(token)),) if request.params.logprobs is not None else (),
                finish_reason=reason if index == len(rest) - 1 else None,
            )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def stream(tokenizer, writer, params, continue_from=(), prompt=(1, 2, 3)):
    service = make_service(tokenizer, writer, max_model_len=ROOM)

    async def collect():
        prompt_ = Prompt(token_ids=prompt, continue_from=continue_from)
        return [delta async for delta in service.stream(prompt_, params)]

    return asyncio.run(collect())


def text_of(deltas):
    return "".join(delta.text for delta in deltas)


def tokens_of(deltas):
    return tuple(token for delta in deltas for token in delta.token_ids)


JAPAN = byte_ids("日本語".encode())  # each character is three tokens
ANSWERS = {
    "text to its end": ((*byte_ids("so"), HELLO, *byte_ids("!"), IM_END), LONG),
    "characters of three tokens": ((*byte_ids("a"), *JAPAN, *byte_ids("b"), IM_END), LONG),
    "a character that is cut off": (JAPAN[:-1], SamplingParams(temperature=0, max_tokens=len(JAPAN) - 1)),
    "a stop string of several tokens": (
        (*byte_ids("lost STO never STOP behind"), IM_END),
        SamplingParams(temperature=0, max_tokens=100, stop=["STOP"], logprobs=0),
    ),
    "a stop string that does not come": (
        (*byte_ids("ends with STO"), IM_END),
        SamplingParams(temperature=0, max_tokens=100, stop=["STOP"]),
    ),
    "a stop string and a character at once": (
        byte_ids("x語STOP語".encode()),
        SamplingParams(temperature=0, max_tokens=100, stop=["語S"], min_tokens=2),
    ),
    "a stop token that is text": (
        byte_ids("abcab"),
        SamplingParams(temperature=0, max_tokens=5, stop_token_ids=byte_ids("b"), min_tokens=2),
    ),
    "an end that is ignored": ((*byte_ids("a"), IM_END, *byte_ids("b")), SamplingParams(
        temperature=0, max_tokens=3, ignore_eos=True)),
}  # fmt: skip


@pytest.mark.parametrize(("token_ids", "params"), ANSWERS.values(), ids=ANSWERS)
def test_at_every_cut_the_rest_is_that_of_the_whole_answer(tokenizer, token_ids, params):
    whole = stream(tokenizer, Writer(token_ids), params)
    given = tokens_of(whole)
    assert whole[-1].finish_reason is not None
    for cut in range(len(whole)):
        received = tokens_of(whole[:cut])
        rest = stream(tokenizer, Writer(token_ids), params, received)
        assert tokens_of(rest) == given[len(received) :]
        assert text_of(rest) == text_of(whole[cut:])
        assert [entry for delta in rest for entry in delta.logprobs] == [
            entry for delta in whole[cut:] for entry in delta.logprobs
        ]
        assert (rest[-1].finish_reason, rest[-1].matched_stop, rest[-1].usage) == (
            whole[-1].finish_reason, whole[-1].matched_stop, whole[-1].usage,
        )  # fmt: skip
        assert rest[0].text_before == text_of(whole[:cut])
    [last] = stream(tokenizer, Writer(token_ids), params, given)  # all tokens came, and the end did not
    assert last.prompt_tokens == last.usage.prompt_tokens
    assert (last.token_ids, last.finish_reason) == ((), whole[-1].finish_reason)
    assert (last.matched_stop, last.usage) == (whole[-1].matched_stop, whole[-1].usage)


def test_an_answer_that_goes_on_outlives_its_replica_too(tokenizer):
    token_ids = (*byte_ids("so it goes"), IM_END)
    writer = Writer(token_ids, lives=[2, 3])
    backend = ReplayingBackend(writer, max_replays=2, room_timeout_s=5.0)
    deltas = stream(tokenizer, backend, LONG, token_ids[:4])
    assert (tokens_of(deltas), text_of(deltas)) == (token_ids[4:], "t goes")
    assert [len(asked.output_token_ids) for asked in writer.requests] == [4, 6, 9]
    assert [asked.num_continued for asked in writer.requests] == [4, 4, 4]


@pytest.mark.parametrize(
    ("continue_from", "params", "message"),
    [
        ((1,) * 6, {"max_tokens": 5}, "continue_from has 6 tokens, .* has 5 at most"),
        ((1,) * ROOM, {}, f"continue_from has {ROOM} tokens, .* has {ROOM - 3} at most: .* the rest of the context"),
        ((1,) * 1_000_000, {}, "continue_from has 1000000 tokens"),
        ((1, 300), {}, "continue_from has 300 at position 1, the vocabulary ends at 299"),
        ((1, -1), {}, "continue_from has -1 at position 1"),
        ((1, IM_END, 2), {}, "continue_from has 3 tokens, the answer ended after 2 of them"),
        (byte_ids("abcd"), {"stop": ["bc"]}, "continue_from has 4 tokens, the answer ended after 3 of them"),
        ((*byte_ids("abc"), IM_END), {"stop": ["bc"]}, "continue_from has 4 tokens, the answer ended after 3 of them"),
        ((1,), {"temperature": 0.7}, "continue_from needs the seed with which the answer began"),
        ((1,), {"temperature": None}, "continue_from needs the seed"),
    ],
)
def test_tokens_that_no_answer_has_are_refused_by_the_fields_name(tokenizer, continue_from, params, message):
    writer = Writer(byte_ids("ab"))
    with pytest.raises(InvalidRequest, match=message) as refusal:
        stream(tokenizer, writer, SamplingParams(**{"temperature": 0, **params}), continue_from)
    assert refusal.value.field == "continue_from"
    assert "\n" not in str(refusal.value)
    assert not writer.requests


def test_a_longer_prompt_leaves_less_room(tokenizer):
    with pytest.raises(InvalidRequest, match=r"continue_from has 10 tokens, .* has 2 at most"):
        stream(tokenizer, Writer((1,)), SamplingParams(temperature=0), (1,) * 10, prompt=(1,) * (ROOM - 2))


# Over gRPC


def grpc_streams(tokenizer, token_ids, *continued):
    """The pieces for each."""
    handlers = GrpcInferenceService(make_service(tokenizer, Writer(token_ids), max_model_len=ROOM))

    async def pieces(continue_from):
        request = pb.GenerateStreamRequest(
            chat=chat(pb.ToolChoice(mode=pb.TOOL_MODE_AUTO)),
            sampling_params=pb.SamplingParams(temperature=0),
            continue_from=continue_from,
        ).SerializeToString()
        return [piece async for piece in handlers.GenerateStream(request, Context())]

    async def every():
        return [await pieces(continue_from) for continue_from in continued]

    return asyncio.run(every())


def without_ids(pieces):
    """Text, and each call's name and arguments; a call's id is drawn anew by each ingress."""
    calls = {}
    for piece in (call for each in pieces for call in each.tool_calls):
        name, arguments = calls.get(piece.index, ("", ""))
        calls[piece.index] = (name + piece.name, arguments + piece.arguments)
    return "".join(piece.text for piece in pieces), calls


def test_calls_of_tools_go_on_over_grpc(tokenizer):
    token_ids = (*tokenizer.encode(CALLS), IM_END)
    whole, *rests = grpc_streams(tokenizer, token_ids, (), *(token_ids[:cut] for cut in range(len(token_ids))))
    for cut, rest in enumerate(rests):
        assert without_ids([*whole[:cut], *rest]) == without_ids(whole)
        assert [piece.num_continued for piece in rest] == [cut] + [0] * (len(rest) - 1)
        assert (rest[-1].finish_reason, rest[-1].usage) == (whole[-1].finish_reason, whole[-1].usage)


def test_a_refusal_over_grpc_names_the_field(tokenizer):
    with pytest.raises(StreamFailed, match="continue_from has 999 at position 0"):
        grpc_streams(tokenizer, (1, 2), [999])


# Over HTTP


def post(tokenizer, path, token_ids, **body):
    front = Front(tokenizer, Writer(token_ids), max_model_len=ROOM)
    fields = {"model": MODEL, "stream": True, "temperature": 0, "return_token_ids": True} | body
    return asyncio.run(front.post(path, fields))


def chat_events(tokenizer, token_ids, *continued):
    """The events of a chat with tools for each."""
    front = Front(tokenizer, Writer(token_ids), max_model_len=ROOM)
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": [json.loads(tool) for tool in TOOLS]}
    body |= {"logprobs": True, "stream": True, "temperature": 0, "return_token_ids": True}

    async def every():
        return [await front.post("/v1/chat/completions", body | {"continue_from": tokens}) for tokens in continued]

    return [events(answer) for answer in asyncio.run(every())]


def said(chunks):
    """Text, calls without their ids, tokens, and the reason of the end."""
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    calls = {}
    for piece in (call for choice in choices for call in choice["delta"].get("tool_calls") or ()):
        name, arguments = calls.get(piece["index"], ("", ""))
        function = piece["function"]
        calls[piece["index"]] = (name + function.get("name", ""), arguments + function["arguments"])
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    token_ids = [token for choice in choices for token in choice.get("token_ids") or ()]
    logprobs = [entry["logprob"] for choice in choices for entry in (choice["logprobs"] or {"content": ()})["content"]]
    return text, calls, token_ids, logprobs, choices[-1]["finish_reason"]


def test_a_chat_goes_on_at_every_event(tokenizer):
    """With token ids each event has all that its tokens say: calls, the text that was held back, the end."""
    token_ids = [*tokenizer.encode(f"{CALLS} \n"), IM_END]
    whole, *rests = chat_events(tokenizer, token_ids, [], *(token_ids[:cut] for cut in range(len(token_ids))))
    assert rests[0][1]["choices"] == whole[1]["choices"]
    assert whole[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(len(chunk["choices"][0]["token_ids"]) == 1 for chunk in whole[1:-1])
    for cut, rest in enumerate(rests):
        assert (rest.pop(), said([*whole[: cut + 1], *rest[not cut :]])) == ("[DONE]", said(whole[:-1]))
    assert said(whole[:-1])[2] == token_ids


def test_pieces_of_a_call_are_one_where_an_event_has_token_ids(tokenizer):
    """A backend that brings all at once: text, two calls and the end are one delta."""

    class AtOnce:
        async def generate(self, request):
            yield SequenceUpdate(request_id="r", token_ids=tokenizer.encode(CALLS), finish_reason="stop")

    front = Front(tokenizer, AtOnce(), max_model_len=ROOM)
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": [json.loads(tool) for tool in TOOLS]}
    body |= {"stream": True, "return_token_ids": True}
    [_, chunk, _] = events(asyncio.run(front.post("/v1/chat/completions", body)))
    [choice] = chunk["choices"]
    assert choice["delta"]["content"] == "Look:"
    calls = choice["delta"]["tool_calls"]
    assert [(call["index"], call["type"], call["function"]) for call in calls] == [
        (index, "function", {"name": "point", "arguments": '{"x": 3}'}) for index in (0, 1)
    ]
    assert choice["finish_reason"] == "tool_calls"


def test_completions_go_on_with_their_offsets_and_without_the_echo(tokenizer):
    token_ids = (*byte_ids("so it goes"), IM_END)
    body = {"prompt": "hello", "max_tokens": 50, "logprobs": 1, "stream_options": {"include_usage": True}}
    *whole, usage, _ = events(post(tokenizer, "/v1/completions", token_ids, **body))
    for cut in range(1, len(token_ids)):
        answer = post(tokenizer, "/v1/completions", token_ids, continue_from=token_ids[:cut], **body)
        *rest, last, _ = events(answer)
        assert [chunk["choices"] for chunk in rest] == [chunk["choices"] for chunk in whole[cut:]]
        assert last["usage"] == usage["usage"]


def test_an_echo_that_is_not_shown_again_is_not_computed_again(tokenizer):
    """Offsets count its characters all the same; of two prompts the one whose answer begins is computed."""
    token_ids = (*byte_ids("so it goes"), IM_END)
    body = {"model": MODEL, "stream": True, "temperature": 0, "max_tokens": 50, "echo": True, "logprobs": 1}

    def asked(prompt, continued):
        writer = Writer(token_ids)
        front = Front(tokenizer, Scoring(writer), max_model_len=ROOM)
        answer = asyncio.run(front.post("/v1/completions", body | {"prompt": prompt, "continue_from": continued}))
        assert answer.status_code == 200, answer.text
        wanted = [request.prompt_token_ids for request in writer.requests if request.wants == "token_logprobs"]
        return [event["choices"] for event in events(answer)[:-1]], wanted

    whole, wanted = asked("hello", None)
    assert len(wanted) == 1
    assert asked("hello", list(token_ids[:3])) == (whole[3:], [])
    _, wanted = asked(["hello", "no"], [list(token_ids[:3]), []])
    assert wanted == [byte_ids("no")]


class Scoring:
    """A writer that also gives each token of a prompt a log-probability."""

    def __init__(self, writer):
        self.writer = writer

    async def generate(self, request):
        if request.wants != "token_logprobs":
            async for update in self.writer.generate(request):
                yield update
            return
        self.writer.requests.append(request)
        rows = [[-0.5, 1.0, token, -0.5] for token in request.prompt_token_ids[1:]]
        numbers = Numbers.of(np.array(rows, dtype=np.float32).reshape(-1, 4))
        yield SequenceUpdate(request_id=request.request_id, finish_reason="stop", numbers=numbers)


def test_offsets_are_counted_with_log_probabilities_alone(tokenizer, monkeypatch):
    counted = []
    monkeypatch.setattr(completions, "token_text", lambda token_id, text_of: counted.append(token_id) or "")
    body = {"prompt": "hello", "max_tokens": 50, "return_token_ids": False}
    post(tokenizer, "/v1/completions", byte_ids("abc"), continue_from=byte_ids("a"), **body)
    assert counted == []


def test_each_of_several_answers_has_its_own_tokens(tokenizer):
    """One has ended, one is half there, one has not begun."""
    token_ids = (*byte_ids("abc"), IM_END)
    given = [list(token_ids), list(token_ids[:2]), []]
    answer = post(tokenizer, "/v1/completions", token_ids, prompt=[5] * 40, n=3, continue_from=given)
    *chunks, _ = events(answer)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    texts = ["".join(c["text"] for c in choices if c["index"] == index) for index in range(3)]
    assert texts == ["", "c", "abc"]
    assert [c["finish_reason"] for c in choices if c["finish_reason"]] == ["stop"] * 3
    assert [c["index"] for c in choices if "prompt_token_ids" in c] == [2]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"continue_from": [1], "stream": False}, "continue_from is for streams: set stream to true"),
        ({"continue_from": [[1], [2]]}, "continue_from has 2 lists of tokens, this call makes 1 answers"),
        ({"continue_from": [1, 2], "n": 2}, "continue_from has one list of tokens, this call makes 2 answers"),
        ({"continue_from": [1, [2]]}, "continue_from"),
        ({"continue_from": "abc"}, "continue_from"),
        ({"continue_from": {"0": 1}}, "continue_from"),
        ({"continue_from": [1.5]}, "continue_from"),
        ({"continue_from": [True]}, "continue_from"),
        ({"continue_from": [2**70]}, "continue_from"),
    ],
)
def test_bodies_are_refused_in_one_line(tokenizer, path, body, message):
    prompt = {"prompt": "hello"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "hi"}]}
    answer = post(tokenizer, path, (1, 2), **prompt, return_token_ids=False, **body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert message in error["message"]
    assert "\n" not in error["message"]
    assert error["param"].startswith("continue_from")


def test_max_tokens_0_has_no_answer_to_go_on_with(tokenizer):
    answer = post(tokenizer, "/v1/completions", (1,), prompt="a", max_tokens=0, echo=True, continue_from=[1])
    assert answer.json()["error"]["param"] == "continue_from"
