"""Calls of tools over gRPC: read where a tool_choice asks for it, whole and in pieces; forced by a grammar."""

import asyncio
import json

import grpc
import pytest
from serving_fakes import EchoBackend, make_service, write_tokenizer

from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.serving.grpc.handlers import GrpcInferenceService
from cluster.serving.text.tokenizer import Tokenizer
from cluster.types import SequenceUpdate

POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
TOOLS = [
    json.dumps({"type": "function", "function": {"name": "point", "parameters": POINT}}),
    json.dumps({"type": "function", "function": {"name": "look"}}),
]
CALL = '<tool_call>\n{"name": "point", "arguments": {"x": 3}}\n</tool_call>'
ANSWER = f"Look:\n{CALL}\n{CALL}"


class Context:
    code, details = None, ""

    def set_code(self, code):
        self.code = code

    def set_details(self, details):
        self.details = details

    def set_trailing_metadata(self, metadata):
        pass

    def invocation_metadata(self):
        return ()

    def peer(self):
        return "ipv4:127.0.0.1:1"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


class Ingress:
    """backend: writes ANSWER, a token at a time."""

    def __init__(self, tokenizer, reason="stop"):
        ids = tokenizer.encode(ANSWER)
        script = [SequenceUpdate(request_id="r", token_ids=(i,), constrained=True) for i in ids[:-1]]
        last = SequenceUpdate(request_id="r", token_ids=(ids[-1],), finish_reason=reason, constrained=True)
        self.backend = EchoBackend(script=[*script, last])
        self.handlers = GrpcInferenceService(make_service(tokenizer, self.backend))
        self.context = Context()

    def generate(self, choice, **fields):
        request = pb.GenerateRequest(chat=chat(choice), **fields)
        return asyncio.run(self.handlers.Generate(request.SerializeToString(), self.context))

    def stream(self, choice):
        request = pb.GenerateStreamRequest(chat=chat(choice)).SerializeToString()

        async def pieces():
            return [piece async for piece in self.handlers.GenerateStream(request, self.context)]

        return asyncio.run(pieces())


def chat(choice, tools=TOOLS):
    turn = pb.ChatMessage(role="user", content="hi")
    return pb.ChatMessages(messages=[turn], tools=tools, tool_choice=choice)


AUTO = pb.ToolChoice(mode=pb.TOOL_MODE_AUTO)


def test_an_answer_has_its_calls(tokenizer):
    answer = Ingress(tokenizer).generate(AUTO)
    assert answer.text == "Look:"
    assert [(call.name, call.arguments) for call in answer.tool_calls] == [("point", '{"x": 3}')] * 2
    assert len({call.id for call in answer.tool_calls}) == 2
    assert answer.finish_reason == pb.FINISH_REASON_TOOL_CALLS
    assert list(answer.token_ids) == list(tokenizer.encode(ANSWER))


def test_pieces_of_a_stream_add_up_to_the_calls(tokenizer):
    pieces = Ingress(tokenizer).stream(AUTO)
    assert "".join(piece.text for piece in pieces) == "Look:"
    calls = [call for piece in pieces for call in piece.tool_calls]
    assert [(call.index, call.name) for call in calls if call.id] == [(0, "point"), (1, "point")]
    for index in (0, 1):
        assert "".join(call.arguments for call in calls if call.index == index) == '{"x": 3}'
    assert len(calls) > 6
    assert [piece.finish_reason for piece in pieces][-2:] == [0, pb.FINISH_REASON_TOOL_CALLS]
    assert [i for piece in pieces for i in piece.token_ids] == list(tokenizer.encode(ANSWER))


@pytest.mark.parametrize("choice", [None, pb.ToolChoice(mode=pb.TOOL_MODE_NONE)], ids=["not set", "none"])
def test_without_a_choice_or_with_none_the_answer_is_text(tokenizer, choice):
    """As clients that knew no tool_choice read it."""
    ingress = Ingress(tokenizer)
    answer = ingress.generate(choice)
    assert (answer.text, answer.finish_reason) == (ANSWER, pb.FINISH_REASON_STOP)
    assert not answer.tool_calls
    assert "".join(piece.text for piece in ingress.stream(choice)) == ANSWER


def test_a_second_call_is_left_out_where_one_is_wanted(tokenizer):
    choice = pb.ToolChoice(mode=pb.TOOL_MODE_AUTO, single=True)
    assert len(Ingress(tokenizer).generate(choice).tool_calls) == 1
    pieces = Ingress(tokenizer).stream(choice)
    assert {call.index for piece in pieces for call in piece.tool_calls} == {0}


def test_an_answer_that_is_cut_off_ends_by_its_length(tokenizer):
    assert Ingress(tokenizer, "length").generate(AUTO).finish_reason == pb.FINISH_REASON_LENGTH


@pytest.mark.parametrize(
    ("choice", "reason", "others"),
    [
        (pb.ToolChoice(mode=pb.TOOL_MODE_REQUIRED), pb.FINISH_REASON_TOOL_CALLS, True),
        (pb.ToolChoice(function="point"), pb.FINISH_REASON_STOP, False),
    ],
    ids=["required", "named"],
)
def test_a_choice_becomes_the_form_of_the_answer(tokenizer, choice, reason, others):
    ingress = Ingress(tokenizer)
    assert ingress.generate(choice).finish_reason == reason
    [request] = ingress.backend.requests
    kind, grammar = request.constraint
    assert kind == "grammar"
    assert ("point" in grammar, "look" in grammar) == (True, others)


@pytest.mark.parametrize(
    ("request_", "word"),
    [
        (pb.GenerateRequest(chat=chat(pb.ToolChoice(function="f"))), "no function 'f'"),
        (pb.GenerateRequest(chat=chat(pb.ToolChoice(mode=pb.TOOL_MODE_REQUIRED), [])), "tools is empty"),
        (pb.GenerateRequest(chat=chat(pb.ToolChoice(mode=pb.TOOL_MODE_REQUIRED), ["{}"])), "tools[0] has no function"),
        (
            pb.GenerateRequest(
                chat=chat(pb.ToolChoice(mode=pb.TOOL_MODE_REQUIRED)),
                sampling_params=pb.SamplingParams(structured_outputs=pb.StructuredOutputs(regex="a")),
            ),
            "another form",
        ),
    ],
    ids=["an unknown function", "no tools", "a tool without a function", "a form beside it"],
)
def test_a_choice_that_cannot_be_is_refused(tokenizer, request_, word):
    ingress = Ingress(tokenizer)
    asyncio.run(ingress.handlers.Generate(request_.SerializeToString(), ingress.context))
    assert ingress.context.code == grpc.StatusCode.INVALID_ARGUMENT
    assert word in ingress.context.details
    assert not ingress.backend.requests
