"""The OpenAPI document's streams: every event that a stream brings is as the document has it."""

import asyncio
import json
from dataclasses import replace

import jsonschema
import pytest
from http_tools import MODEL, Front
from serving_fakes import IM_END, EchoBackend, byte_ids, write_tokenizer

from cluster.errors import Unavailable
from cluster.serving.text.tokenizer import Tokenizer
from cluster.types import Logprobs, SequenceUpdate

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
TURNS = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 200}
FUNCTION = {"name": "add", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FUNCTION}
CASES = {
    "/v1/chat/completions": {**TURNS, "tools": [TOOL], "logprobs": True, "stream_options": {"include_usage": True}},
    "/v1/completions": {"prompt": "hi", "max_tokens": 200, "logprobs": 1, "return_token_ids": True},
    "/v1/messages": {**TURNS, "model": MODEL, "tools": [{"name": "add", "input_schema": {"type": "object"}}]},
    "/v1/responses": {"input": "hi", "tools": [{"type": "function", **FUNCTION}], "max_output_tokens": 200},
}


class Breaking(EchoBackend):
    """Ends its script with an error."""

    async def generate(self, request):
        async for update in super().generate(request):
            yield replace(update, finish_reason=None)
        raise Unavailable("a shard is gone")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def says(text, backend=EchoBackend):
    ids = [*byte_ids(text), IM_END]
    updates = [
        SequenceUpdate(request_id="a", token_ids=(i,), logprobs=(Logprobs(i, -0.5, ((i, -0.5),)),), constrained=True)
        for i in ids
    ]
    return backend(script=[*updates[:-1], replace(updates[-1], finish_reason="stop")])


def streamed(tokenizer, path, backend):
    """The names and data of a stream's events, and the document."""

    async def run():
        front = Front(tokenizer, backend, max_model_len=1000)
        document = (await front.get("/openapi.json")).json()
        answer = await front.post(path, {**CASES[path], "stream": True})
        assert answer.status_code == 200, answer.text
        return document, [
            dict(line.split(": ", 1) for line in one.split("\n")) for one in answer.text.split("\n\n")[:-1]
        ]

    return asyncio.run(run())


def whole(document, schema):
    """With the definitions that it refers to."""
    return {**schema, "components": document["components"]}


def schemas_of(document, path):
    """The schemas of an event of the path's stream, and of its data: a good one's, an error's."""
    item = document["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]["itemSchema"]
    text = item["properties"]["data"]
    return item, text.get("anyOf", [text])[0]["contentSchema"]["anyOf"]


@pytest.mark.parametrize("backend", [EchoBackend, Breaking], ids=["whole", "broken"])
@pytest.mark.parametrize("path", CASES)
def test_every_event_is_as_the_document_has_it(tokenizer, path, backend):
    document, events = streamed(tokenizer, path, says(f"Look: {CALL}", backend))
    item, schemas = schemas_of(document, path)
    assert len(events) > 10
    kinds = set()
    for event in events:
        jsonschema.validate(event, whole(document, item))
        if event["data"] == "[DONE]":
            continue
        data = json.loads(event["data"])
        failed = "error" in (data.get("type"), *data)
        jsonschema.validate(data, whole(document, schemas[failed]))
        kinds.add(data.get("type"))
    assert (events[-1]["data"] == "[DONE]") == ("completions" in path and backend is EchoBackend)
    kind_of = document["components"]["schemas"][schemas[0]["$ref"].rpartition("/")[2]].get("discriminator")
    if kind_of is not None and backend is EchoBackend:
        assert kinds == set(kind_of["mapping"]) - {"response.queued", "response.incomplete", "response.failed"}


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("/v1/chat/completions", {"id": "a", "object": "chat.completion.chunk", "created": 1, "model": "m"}),
        ("/v1/completions", {"id": "a", "choices": []}),
        ("/v1/messages", {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta"}}),
        ("/v1/messages", {"type": "message_stop", "more": 1}),
        ("/v1/responses", {"type": "response.output_text.delta", "delta": "x", "sequence_number": 1}),
        ("/v1/responses", {"type": "response.unknown", "sequence_number": 1}),
    ],
)
def test_other_data_is_not(tokenizer, path, wrong):
    document = asyncio.run(Front(tokenizer).get("/openapi.json")).json()
    _, (schema, _) = schemas_of(document, path)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, whole(document, schema))


def test_every_reference_of_the_document_leads_somewhere(tokenizer):
    document = asyncio.run(Front(tokenizer).get("/openapi.json")).json()
    found = set()

    def look(value):
        if isinstance(value, dict):
            found.update(value[key] for key in ("$ref",) if isinstance(value.get(key), str))
            found.update((value.get("discriminator") or {}).get("mapping", {}).values())
        for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            look(each)

    look(document)
    assert {ref.removeprefix("#/components/schemas/") for ref in found} <= document["components"]["schemas"].keys()
    assert len(found) > 40
