"""Forms of answers in the served application: by gRPC and HTTP, with OpenAI's own client, and when engines die."""

import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import pytest

from cluster import LLM, SamplingParams
from cluster.chaos.faults import inject
from cluster.client.grpc_client import Client
from cluster.errors import InvalidRequest
from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.runtime.operate import RunningCluster

pytestmark = pytest.mark.ray

LISTS = {
    "type": "object",
    "properties": {
        "names": {"type": "array", "items": {"type": "string", "maxLength": 9}, "minItems": 6, "maxItems": 12},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["names", "count"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "note", "parameters": LISTS}}


def random_text(seed, **form):
    return SamplingParams(
        temperature=1, top_p=1, top_k=0, repetition_penalty=1, seed=seed, max_tokens=600, structured_outputs=form
    )


def answer(client, seed, **form):
    return [token for piece in client.stream("Go on", random_text(seed, **form)) for token in piece.token_ids]


def test_forms_are_kept_over_grpc_and_refused_before_anything_runs(served):
    with Client(f"127.0.0.1:{served.grpc_port}") as client:
        text = "".join(piece.text for piece in client.stream("Go on", random_text(1, json=LISTS)))
        jsonschema.validate(json.loads(text), LISTS)
        with pytest.raises(InvalidRequest, match="look-around"):
            list(client.stream("Go on", random_text(1, regex="(?=a)")))


def test_openais_client_gets_json_and_calls(client):
    messages = [{"role": "user", "content": "Note it"}]
    fields = {"model": "demo-moe", "messages": messages, "temperature": 1, "seed": 2, "max_tokens": 600}
    schema = {"type": "json_schema", "json_schema": {"name": "lists", "schema": LISTS}}
    content = client.chat.completions.create(**fields, response_format=schema).choices[0].message.content
    jsonschema.validate(json.loads(content), LISTS)
    choice = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    [whole] = client.chat.completions.create(**fields, **choice).choices
    with client.chat.completions.stream(**fields, **choice) as stream:
        [streamed] = stream.get_final_completion().choices
    for one in (whole, streamed):
        [call] = one.message.tool_calls
        assert (call.function.name, one.finish_reason) == ("note", "tool_calls")
        jsonschema.validate(json.loads(call.function.arguments), LISTS)
    assert streamed.message.tool_calls[0].function.arguments == whole.message.tool_calls[0].function.arguments


EXPERT = {
    "type": "object",
    "properties": {"expert": {"type": "integer", "minimum": 0, "maximum": 63}, "why": {"enum": ["busy", "idle"]}},
    "required": ["expert", "why"],
    "additionalProperties": False,
}
EXPERT_TOOL = {"type": "function", "function": {"name": "move", "parameters": EXPERT}}


@pytest.mark.parametrize(
    ("choice", "names", "reason"),
    [
        (pb.ToolChoice(mode=pb.TOOL_MODE_REQUIRED, single=True), {"move", "note"}, pb.FINISH_REASON_TOOL_CALLS),
        (pb.ToolChoice(function="move"), {"move"}, pb.FINISH_REASON_STOP),
    ],
    ids=["required", "named"],
)
def test_grpc_gives_calls_whole_and_in_pieces(stub, choice, names, reason):
    """A model of random weights calls a function only because its grammar leaves nothing else."""
    turn = pb.ChatMessage(role="user", content="Note it")
    tools = [json.dumps(tool) for tool in (EXPERT_TOOL, TOOL)]
    chat = pb.ChatMessages(messages=[turn], tools=tools, tool_choice=choice)
    params = pb.SamplingParams(temperature=1, seed=2, max_tokens=600)
    whole = stub.Generate(pb.GenerateRequest(chat=chat, sampling_params=params))
    [call] = whole.tool_calls
    assert (whole.text, whole.finish_reason) == ("", reason)
    assert call.id
    assert call.name in names
    jsonschema.validate(json.loads(call.arguments), EXPERT if call.name == "move" else LISTS)
    pieces = list(stub.GenerateStream(pb.GenerateStreamRequest(chat=chat, sampling_params=params)))
    calls = [piece for message in pieces for piece in message.tool_calls]
    assert {piece.index for piece in calls} == {0}
    assert [piece.name for piece in calls if piece.id] == [call.name]
    assert "".join(piece.arguments for piece in calls) == call.arguments
    assert len(calls) > 2
    assert [message.finish_reason for message in pieces][-2:] == [0, reason]
    assert [i for message in pieces for i in message.token_ids] == list(whole.token_ids)


@pytest.mark.slow
@pytest.mark.chaos
def test_answers_stay_the_same_when_their_engine_dies(served, demo_checkpoint):
    """Their grammar goes on at another replica where it was: each is the answer of one process."""
    with LLM(demo_checkpoint, dtype="float32", kv_cache_bytes=4 << 20) as llm:
        found = llm.generate(["Go on"] * 4, [random_text(seed, json=LISTS) for seed in range(4)])
    expected = [list(output.token_ids) for output in found]
    over, answers = threading.Event(), []

    def ask(seed):
        with Client(f"127.0.0.1:{served.grpc_port}") as client:
            while not over.is_set():
                answers.append((seed, answer(client, seed, json=LISTS)))

    with RunningCluster() as cluster, ThreadPoolExecutor(4) as threads:
        asking = [threads.submit(ask, seed) for seed in range(4)]
        try:
            for seed in range(2):
                inject("kill-replica", cluster, random.Random(seed), 2, 120.0)
        finally:
            over.set()
        for one in asking:
            one.result()
    assert len(answers) >= 4
    for seed, tokens in answers:
        assert tokens == expected[seed]
