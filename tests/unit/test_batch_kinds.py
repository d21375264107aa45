"""Each kind of request in a batch without a server: embeddings, calls of tools, forms of answers, and refusals."""

import json
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest

from cluster import LLM, cli

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": CITY}}]
HI = [{"role": "user", "content": "hi"}]
FORM = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
SAMPLED = {"messages": HI, "max_tokens": 400, "temperature": 1, "seed": 1}
CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
BODIES = {
    "vectors": (EMBEDDINGS, {"input": ["hello", "a b"]}),
    "of ids": (EMBEDDINGS, {"input": [1, 2, 3]}),
    "called": (CHAT, {**SAMPLED, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}),
    "named": (CHAT, {**SAMPLED, "tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "weather"}}}),
    "schema": (CHAT, {**SAMPLED, "response_format": FORM}),
    "choice": (COMPLETIONS, {"prompt": "x", "structured_outputs": {"choice": ["yes", "no"]}}),
    "no form": (CHAT, {**SAMPLED, "response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}),
    "no tool": (CHAT, {**SAMPLED, "tool_choice": "required"}),
    "no field": (EMBEDDINGS, {"input": "x", "inptu": "y"}),
    "no input": (EMBEDDINGS, {"input": []}),
}
REFUSALS = {"no form": "response_format", "no tool": "tool_choice", "no field": "inptu", "no input": "input"}


@pytest.fixture(scope="module")
def batch(tmp_path_factory, demo_checkpoint):
    """The file of answers, by custom_id, and the command's exit code."""
    folder = tmp_path_factory.mktemp("batch")
    lines = [{"custom_id": name, "method": "POST", "url": url, "body": body} for name, (url, body) in BODIES.items()]
    lines.append({"custom_id": "no url", "method": "POST", "url": "/v1/audio", "body": {}})
    (folder / "in").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--model", str(demo_checkpoint), "--dtype", "float32", "--kv-cache-bytes", "8MiB"]
    code = cli.main(["batch", str(folder / "in"), str(folder / "out"), *options])
    found = {one["custom_id"]: one for one in map(json.loads, (folder / "out").read_text().splitlines())}
    return SimpleNamespace(code=code, lines=found)


def body(batch, name):
    response = batch.lines[name]["response"]
    assert response["status_code"] == 200, response
    return response["body"]


def test_every_line_has_an_answer_or_an_error(batch):
    assert batch.code == 1
    assert set(batch.lines) == {*BODIES, "no url"}


def test_vectors_are_those_of_the_model(batch, demo_checkpoint):
    with LLM(demo_checkpoint, dtype="float32", kv_cache_bytes=8 << 20) as llm:
        expected = llm.embed(["hello", "a b", [1, 2, 3]])
    found = body(batch, "vectors")["data"] + body(batch, "of ids")["data"]
    assert [one["index"] for one in found] == [0, 1, 0]
    for one, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(one["embedding"], wanted.embedding, atol=1e-6)


@pytest.mark.parametrize(("name", "reason"), [("called", "tool_calls"), ("named", "stop")])
def test_calls_of_tools_are_by_their_schemas(batch, name, reason):
    [choice] = body(batch, name)["choices"]
    [call] = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    jsonschema.validate(json.loads(call["function"]["arguments"]), CITY)
    assert choice["finish_reason"] == reason


def test_answers_have_the_form_that_their_line_asks_for(batch):
    jsonschema.validate(json.loads(body(batch, "schema")["choices"][0]["message"]["content"]), CITY)
    assert body(batch, "choice")["choices"][0]["text"] in ("yes", "no")


@pytest.mark.parametrize(("name", "param"), REFUSALS.items())
def test_a_refusal_is_an_answer_in_openais_shape(batch, name, param):
    """As in the files that OpenAI's batches give: the status and the body of the refused call; `error` is for a line
    that was no request."""
    line = batch.lines[name]
    assert line["error"] is None
    assert line["response"]["status_code"] == 400
    error = line["response"]["body"]["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


def test_a_line_that_is_no_request_has_an_error_and_no_response(batch):
    line = batch.lines["no url"]
    assert line["response"] is None
    assert set(line["error"]) == {"code", "message"}
    assert line["error"]["code"] == "invalid_url"
