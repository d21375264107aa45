"""`/v1/responses` on a fake service: by hand, and by OpenAI's own client."""

import asyncio
import json
from dataclasses import replace

import openai
import pytest
from http_tools import MODEL, Front, scope_of
from pydantic import BaseModel
from serving_fakes import IM_END, EchoBackend, byte_ids, write_tokenizer

from cluster.errors import Overloaded, ShardUnavailable
from cluster.serving.admission.api_keys import ApiKeys, new_key
from cluster.serving.openai.responses.items import to_chat
from cluster.serving.openai.responses.schema import ITEMS, ResponseRequest
from cluster.serving.text.tokenizer import Tokenizer
from cluster.types import Logprobs, SequenceUpdate

PATH = "/v1/responses"
# <|im_start|> user \n h i <|im_end|> \n <|im_start|> assistant \n: the words are bytes.
NUM_PROMPT_TOKENS = 1 + 4 + 1 + 2 + 1 + 1 + 1 + 9 + 1
ADD = {"type": "function", "name": "add", "parameters": {"type": "object"}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def says(text, end=IM_END):
    """A backend whose answer is this text, a token at a time, and an end."""
    updates = [SequenceUpdate(request_id="a", token_ids=(one,), constrained=True) for one in byte_ids(text)]
    last = SequenceUpdate(request_id="a", token_ids=(end,) if end else (), finish_reason="stop" if end else "length")
    return EchoBackend(script=[*updates, replace(last, constrained=True)])


def deep(num_objects):
    return json.loads('{"a":' * num_objects + "1" + "}" * num_objects)


def front(tokenizer, backend=None, **options):
    return Front(tokenizer, backend or says("Hello!"), max_model_len=400, **options)


def post(tokenizer, body, backend=None):
    return asyncio.run(post_to(front(tokenizer, backend), body))


async def post_to(server, body):
    """With JSON that has escapes in place of half characters."""
    async with server.client() as client:
        return await client.post(PATH, content=json.dumps(body), headers={"content-type": "application/json"})


def named_events(response):
    """The events of a stream, each checked for its name and its number."""
    found = []
    for block in response.text.strip().split("\n\n"):
        kind, data = block.split("\n")
        body = json.loads(data.removeprefix("data: "))
        assert kind == f"event: {body['type']}"
        found.append(body)
    assert [body["sequence_number"] for body in found] == list(range(len(found)))
    return found


def kinds(events):
    return [body["type"].removeprefix("response.") for body in events]


def test_a_response_has_openais_shape(tokenizer):
    answer = post(tokenizer, {"input": "hi", "metadata": {"a": "b"}, "instructions": None, "user": "me"}).json()
    [message] = answer.pop("output")
    assert answer.pop("id").startswith("resp_")
    assert message.pop("id").startswith("msg_")
    assert message == {
        "type": "message", "status": "completed", "role": "assistant",
        "content": [{"type": "output_text", "text": "Hello!", "annotations": [], "logprobs": []}],
    }  # fmt: skip
    assert answer == {
        "object": "response", "created_at": 1234, "completed_at": 1234, "status": "completed", "background": False,
        "error": None, "incomplete_details": None, "instructions": None, "max_output_tokens": None,
        "max_tool_calls": None, "metadata": {"a": "b"}, "model": MODEL, "parallel_tool_calls": True,
        "previous_response_id": None, "prompt_cache_key": None, "reasoning": {"effort": None, "summary": None},
        "safety_identifier": None, "service_tier": "default", "store": True, "temperature": None,
        "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [], "top_logprobs": 0, "top_p": None,
        "truncation": "disabled", "user": "me",
        "usage": {
            "input_tokens": NUM_PROMPT_TOKENS, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": 7, "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": NUM_PROMPT_TOKENS + 7,
        },
    }  # fmt: skip


def test_a_stream_has_openais_events(tokenizer):
    events = named_events(post(tokenizer, {"input": "hi", "stream": True}))
    assert kinds(events) == [
        "created", "in_progress", "output_item.added", "content_part.added", *["output_text.delta"] * 6,
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    item = events[2]["item"]
    assert (item["status"], item["content"]) == ("in_progress", [])
    assert all(body["item_id"] == item["id"] and body["output_index"] == 0 for body in events[3:12])
    assert "".join(body["delta"] for body in events[4:10]) == events[10]["text"] == "Hello!"
    assert events[12]["item"] == events[13]["response"]["output"][0]
    assert [events[i]["response"]["status"] for i in (0, 1, 13)] == ["in_progress", "in_progress", "completed"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_cut_is_incomplete(tokenizer, stream):
    answer = post(tokenizer, {"input": "hi", "stream": stream}, says("Hel", end=None))
    response = named_events(answer)[-1]["response"] if stream else answer.json()
    if stream:
        assert kinds(named_events(answer))[-1] == "incomplete"
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert (response["output"][0]["status"], response["completed_at"]) == ("incomplete", None)


def test_an_error_inside_a_stream_makes_a_failed_response(tokenizer):
    broken = EchoBackend(script=[SequenceUpdate(request_id="a", token_ids=(64,)), ShardUnavailable("a shard is gone")])
    events = named_events(post(tokenizer, {"input": "hi", "stream": True}, broken))
    assert kinds(events)[-2:] == ["output_item.done", "failed"]
    assert events[-1]["response"]["status"] == "failed"
    assert events[-1]["response"]["error"] == {"code": "server_error", "message": "a shard is gone"}


def test_an_error_before_the_first_token_has_its_status(tokenizer):
    response = post(tokenizer, {"input": "hi", "stream": True}, EchoBackend(script=[Overloaded("full", 2.0)]))
    assert (response.status_code, response.headers["retry-after"]) == (429, "2")


def test_a_called_tool_is_an_item_of_its_own(tokenizer):
    body = {"input": "hi", "tools": [ADD], "stream": True}
    events = named_events(post(tokenizer, body, says("Well. " + CALL)))
    text, call = events[-1]["response"]["output"]
    assert text["content"][0]["text"].strip() == "Well."
    assert (call["type"], call["name"], json.loads(call["arguments"])) == ("function_call", "add", {"a": 1})
    assert (call["call_id"][:5], call["id"][:3], call["status"]) == ("call_", "fc_", "completed")
    about = [body for body in events if body.get("item_id") == call["id"]]
    assert "".join(body.get("delta", "") for body in about) == about[-1]["arguments"] == call["arguments"]
    assert kinds(about)[-1] == "function_call_arguments.done"
    assert [body["output_index"] for body in events if body["type"] == "response.output_item.done"] == [0, 1]
    assert post(tokenizer, body | {"stream": False}, says(CALL)).json()["output"][0]["type"] == "function_call"


def test_log_probabilities_come_with_the_text(tokenizer):
    def token(one, reason=None):
        entry = Logprobs(one, -0.5, ((one, -0.5),))
        return SequenceUpdate(request_id="a", token_ids=(one,), logprobs=(entry,), finish_reason=reason)

    backend = EchoBackend(script=[*map(token, byte_ids("ab")), token(IM_END, "stop")])
    body = {"input": "hi", "stream": True, "include": ["message.output_text.logprobs"], "top_logprobs": 1}
    events = named_events(post(tokenizer, body, backend))
    [message] = events[-1]["response"]["output"]
    found = message["content"][0]["logprobs"]
    assert [entry["token"] for entry in found] == ["a", "b", "<|im_end|>"]
    top = {"token": "a", "logprob": -0.5, "bytes": [97]}
    assert found[0] == top | {"top_logprobs": [top]}
    assert [e for body in events if body["type"].endswith("text.delta") for e in body["logprobs"]] == found


def test_items_become_the_templates_turns():
    body = ResponseRequest.model_validate({
        "instructions": "Be brief.", "tools": [ADD | {"description": "adds"}], "max_output_tokens": 5, "top_k": 3,
        "tool_choice": {"type": "function", "name": "add"}, "seed": 7, "stop": ["x"],
        "text": {"format": {"type": "text"}},
        "input": [
            {"role": "user", "content": "1 + 2?"},
            {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed", "phase": None,
             "content": [{"type": "output_text", "text": "Let me see.", "annotations": [], "logprobs": []}]},
            {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "add", "arguments": "{}"},
            {"type": "function_call", "call_id": "c2", "name": "add", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "3"},
            {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "4"}]},
            {"type": "function_call", "call_id": "c3", "name": "add", "arguments": "{}"},
            {"role": "developer", "content": [{"type": "input_text", "text": text} for text in "ab"]},
        ],
    })  # fmt: skip
    chat = to_chat(body, ITEMS.validate_python([item.model_dump(exclude_none=True) for item in body.input]))

    def call(call_id):
        return {"id": call_id, "type": "function", "function": {"name": "add", "arguments": "{}"}}

    assert [message.model_dump(exclude_none=True) for message in chat.messages] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call("c1"), call("c2")]},
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
        {"role": "tool", "content": "4", "tool_call_id": "c2"},
        {"role": "assistant", "tool_calls": [call("c3")]},
        {"role": "developer", "content": "a\nb"},
    ]
    assert chat.tool_choice.function == {"name": "add"}
    assert (chat.max_completion_tokens, chat.top_k, chat.seed, chat.stop) == (5, 3, 7, ["x"])
    assert chat.response_format is None


@pytest.mark.parametrize(
    ("body", "field", "word"),
    [
        ({}, "input", "required"),
        ({"input": []}, "input", "0 messages"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input", "reasoning"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input", "item_reference"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input", "input_image"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{"}]}, "input", "no JSON"),
        ({"input": "x" * 500}, "input", "the context has 400"),
        ({"input": "x" * 500, "background": True}, "input", "the context has 400"),
        ({"input": "hi", "max_output_tokens": 900}, "max_output_tokens", "900"),
        ({"input": "hi", "background": True, "store": False}, "background", "store"),
        ({"input": "hi", "tools": [{"type": "web_search"}]}, "tools", "function"),
        ({"input": "hi", "tool_choice": "required"}, "tool_choice", "tool"),
        ({"input": "hi", "reasoning": {"effort": "low"}}, "reasoning", "reasoning"),
        ({"input": "hi", "conversation": "c"}, "conversation", "conversation"),
        ({"input": "hi", "prompt": {"id": "p"}}, "prompt", "prompt"),
        ({"input": "hi", "stream_options": {"include_obfuscation": False}}, "stream_options", "stream"),
        ({"input": "hi", "top_logprobs": 2}, "top_logprobs", "include"),
        ({"input": "hi", "metadata": {str(i): "" for i in range(17)}}, "metadata", "16"),
        ({"input": "hi", "tool_choice": "none", "tools": [ADD | {"parameters": deep(300)}]}, None, "too deep"),
        ({"input": "hi", "user": "\ud800"}, None, "half a character"),
        ({"input": "hi", "text": {"format": {"type": "json_schema", "name": "x"}}}, "text", "schema"),
        ({"input": "hi", "text": {"verbosity": "low"}}, "text", "verbosity"),
        ({"input": "hi", "text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "a"}}, "text",
         "structured_outputs"),
        ({"input": "hi", "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "x"}}}}, "text",
         "text cannot be used"),
    ],
)  # fmt: skip
def test_bad_bodies_are_refused_by_the_fields_name(tokenizer, body, field, word):
    response = post(tokenizer, body)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", field)
    assert word in error["message"]


def run_client(tokenizer, work, backend=None, **options):
    """Lets OpenAI's client work on the application in this process; returns the backend."""

    async def run():
        server = front(tokenizer, backend, **options)
        async with (
            server.client() as http,
            openai.AsyncOpenAI(base_url="http://server/v1", api_key="k", http_client=http, max_retries=0) as client,
        ):
            await work(client)
        return server.backend

    return asyncio.run(run())


def test_openais_own_client_reads_all_of_it(tokenizer):
    async def work(client):
        response = await client.responses.create(model=MODEL, input="hi")
        assert (response.output_text, response.status) == ("Hello!", "completed")
        async with client.responses.stream(model=MODEL, input="hi") as stream:
            deltas = [event.delta async for event in stream if event.type == "response.output_text.delta"]
            final = await stream.get_final_response()
        assert ("".join(deltas), final.output_text) == ("Hello!", "Hello!")
        assert await client.responses.retrieve(response.id) == response
        again = [event async for event in await client.responses.retrieve(final.id, stream=True, starting_after=3)]
        assert [event.sequence_number for event in again] == list(range(4, 14))
        assert again[-1].response == (await client.responses.retrieve(final.id))
        [item] = (await client.responses.input_items.list(response.id)).data
        assert (item.role, item.content[0].text) == ("user", "hi")
        await client.responses.delete(response.id)
        for call in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
            with pytest.raises(openai.NotFoundError, match=f"Response with id '{response.id}' not found"):
                await call(response.id)

    run_client(tokenizer, work)


CALLS_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "[{{ c.id[:2] }}{{ c.function.name }}{{ c.function.arguments | tojson }}]{% endfor %}{% endfor %}"
)


def test_a_tools_answer_goes_back_to_the_model(tmp_path):
    """By the items themselves, and by the id of the response before: the prompts are the same."""

    async def work(client):
        first = await client.responses.create(model=MODEL, input="hi", tools=[ADD])
        [call] = first.output
        answer = {"type": "function_call_output", "call_id": call.call_id, "output": "3"}
        asked = [{"role": "user", "content": "hi"}, *first.output, answer]
        await client.responses.create(model=MODEL, input=asked, tools=[ADD])
        second = await client.responses.create(model=MODEL, input=[answer], tools=[ADD], previous_response_id=first.id)
        kinds = [item.type async for item in client.responses.input_items.list(second.id, order="asc", limit=2)]
        assert kinds == ["message", "function_call", "function_call_output"]  # in two pages

    tokenizer = Tokenizer(write_tokenizer(tmp_path, chat_template=CALLS_TEMPLATE))
    _, by_items, by_id = [request.prompt_token_ids for request in run_client(tokenizer, work, says(CALL)).requests]
    assert by_items == by_id == byte_ids('<user>hi<assistant>[caadd{"a": 1}]<tool>3')


class City(BaseModel):
    name: str


def test_an_answer_is_parsed_by_its_schema(tokenizer):
    """The engine keeps to the schema: here it is fake, and the test sees that it is asked to."""

    async def work(client):
        response = await client.responses.parse(model=MODEL, input="hi", text_format=City)
        assert response.output_parsed == City(name="Ulm")
        assert response.text.format.schema_ == City.model_json_schema() | {"additionalProperties": False}

    backend = run_client(tokenizer, work, says('{"name":"Ulm"}'))
    assert "name" in backend.requests[0].constraint[1]


@pytest.mark.parametrize(("num_turns", "kept"), [(1, 1), (2, 2), (6, 4)])
def test_the_oldest_turns_are_left_out_where_there_is_no_room(tmp_path, num_turns, kept):
    """<system>s has 9 tokens, <user>t9 8, <user>t0<assistant>a0 21, the answer 5; there is room for three turns."""
    items = [{"role": "system", "content": "s"}]
    for index in range(num_turns - 1):
        items += [{"role": "user", "content": f"t{index}"}, {"role": "assistant", "content": f"a{index}"}]
    items.append({"role": "user", "content": "t9"})
    tokenizer = Tokenizer(write_tokenizer(tmp_path, chat_template=CALLS_TEMPLATE))
    server = Front(tokenizer, says("Hello!"), max_model_len=9 + 8 + 3 * 21 + 5)
    body = {"input": items, "truncation": "auto", "max_output_tokens": 5}
    assert asyncio.run(server.post(PATH, body)).status_code == 200
    turns = [f"<user>t{i}<assistant>a{i}" for i in range(num_turns - 1)][-(kept - 1) :] if kept > 1 else []
    assert server.backend.requests[0].prompt_token_ids == byte_ids("<system>s" + "".join(turns) + "<user>t9")
    if num_turns > kept:
        refused = asyncio.run(server.post(PATH, body | {"truncation": "disabled"}))
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input")


def test_odd_values_that_are_only_given_back_do_no_harm(tokenizer):
    """240 objects in one another are as many as pydantic writes, about."""

    async def run():
        server = front(tokenizer, max_request_bytes=100_000)
        part = {"type": "output_text", "text": "x", "annotations": [deep(400)], "logprobs": [deep(400)]}
        turns = [{"role": "assistant", "content": [part]}, {"role": "user", "content": "hi", "id": "\ud800"}]
        tools = [ADD | {"parameters": deep(240) | {"b": float("nan")}}]
        answer = await post_to(server, {"input": turns, "tool_choice": "none", "tools": tools})
        assert answer.status_code == 200
        kept = await server.get(f"{PATH}/{answer.json()['id']}")
        assert kept.json() == answer.json()
        assert answer.json()["tools"][0]["parameters"]["b"] is None
        first, second = (await server.get(f"{PATH}/{answer.json()['id']}/input_items?order=asc")).json()["data"]
        assert first["content"] == [{"type": "output_text", "text": "x", "annotations": []}]
        assert second["id"] == "\ud800"

    asyncio.run(run())


def test_a_key_finds_its_own_responses_alone(tokenizer, tmp_path):
    keys, lines = zip(*map(new_key, ("alice", "bob")), strict=True)
    (tmp_path / "keys").write_text("\n".join(lines) + "\n")
    alice, bob = [{"authorization": f"Bearer {key}"} for key in keys]

    async def run():
        server = front(tokenizer, keys=ApiKeys(tmp_path / "keys", lambda: 0.0))
        made = (await server.post(PATH, {"input": "hi", "background": True}, headers=alice)).json()["id"]
        path = f"{PATH}/{made}"
        async with server.client() as client:
            calls = [("GET", path), ("DELETE", path), ("GET", f"{path}/input_items"), ("GET", f"{path}?stream=true")]
            for method, where in [*calls, ("POST", f"{path}/cancel")]:
                refused = await client.request(method, where, headers=bob)
                error = refused.json()["error"]
                assert (refused.status_code, error["type"], error["code"]) == (404, "invalid_request_error", None)
                assert "not found" in error["message"]
            goes_on = await client.post(PATH, json={"input": "?", "previous_response_id": made}, headers=bob)
            assert (goes_on.status_code, goes_on.json()["error"]["code"]) == (400, "previous_response_not_found")
            assert (await client.get(path, headers=alice)).status_code == 200

    asyncio.run(run())


def test_a_client_that_hangs_up_ends_its_response_and_finds_what_there_was(tokenizer):
    class Halting(EchoBackend):
        async def generate(self, request):
            async for update in super().generate(request):
                yield update
            await asyncio.Event().wait()

    async def run():
        backend = Halting(script=[SequenceUpdate(request_id="a", token_ids=(one,)) for one in byte_ids("Hel")])
        server, left, received = front(tokenizer, backend), asyncio.Event(), []
        sent = [{"type": "http.request", "body": json.dumps({"input": "hi", "stream": True}).encode()}]

        async def receive():
            if sent:
                return sent.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            received.append(message.get("body", b"").decode())
            if '"delta":"l"' in received[-1]:
                left.set()

        await asyncio.wait_for(server.app(scope_of(PATH), receive, send), 10)
        assert server.service.admission.num_running == 0
        seen = [json.loads(text.split("data: ")[1]) for text in received if text]
        path = f"{PATH}/{seen[0]['response']['id']}"
        kept = (await server.get(path)).json()
        assert (kept["status"], kept["output"][0]["content"][0]["text"]) == ("cancelled", "Hel")
        again = named_events(await server.get(f"{path}?stream=true"))
        assert again[: len(seen)] == seen
        assert again[-1]["response"] == kept

    asyncio.run(run())
