"""Forms of answers in the served application: by gRPC and HTTP, with OpenAI's own client, and when engines die."""

import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import openai
import pytest

from cluster import LLM, SamplingParams
from cluster.chaos.faults import inject
from cluster.client.grpc_client import Client
from cluster.errors import InvalidRequest
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
    "x-guidance": {"whitespace_flexible": False},
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


def test_openais_client_gets_json_and_calls(served):
    messages = [{"role": "user", "content": "Note it"}]
    fields = {"model": "demo-moe", "messages": messages, "temperature": 1, "seed": 2, "max_tokens": 600}
    schema = {"type": "json_schema", "json_schema": {"name": "lists", "schema": LISTS}}
    with openai.OpenAI(base_url=f"{served.http_url}/v1", api_key="any", max_retries=0) as client:
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
