"""Anthropic's API on a fake service: by hand, and by Anthropic's own client."""

import asyncio
import json
from dataclasses import replace

import anthropic
import pytest
from http_tools import MODEL, Front
from serving_fakes import IM_END, EchoBackend, byte_ids, write_tokenizer

from cluster.errors import ShardUnavailable
from cluster.serving.openai.chat_schema import ChatRequest
from cluster.serving.openai.conversations import to_conversation
from cluster.serving.openai.messages import _object, _prompt_fields
from cluster.serving.openai.messages_schema import MessagesRequest
from cluster.serving.text.tokenizer import Tokenizer
from cluster.types import SequenceUpdate

# <|im_start|> user \n h i <|im_end|> \n <|im_start|> assistant \n: the words are bytes.
NUM_PROMPT_TOKENS = 1 + 4 + 1 + 2 + 1 + 1 + 1 + 9 + 1
PATH = "/v1/messages"
HELLO = {"model": MODEL, "max_tokens": 40, "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def says(text, end=IM_END):
    """A backend whose answer is this text, a token at a time, and an end."""
    ids = byte_ids(text)
    updates = [SequenceUpdate(request_id="a", token_ids=(one,)) for one in ids]
    last = SequenceUpdate(request_id="a", token_ids=(end,) if end else (), finish_reason="stop" if end else "length")
    return EchoBackend(script=[*updates, last])


def post(tokenizer, body, backend=None, path=PATH):
    return asyncio.run(Front(tokenizer, backend or says("Hello!")).post(path, body))


def usage(num_tokens, num_cached=0):
    """Anthropic's: the prompt's tokens are those that a cache had, those that it got, and the others."""
    return {
        "input_tokens": NUM_PROMPT_TOKENS - num_cached,
        "cache_read_input_tokens": num_cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": num_tokens,
    }


def named_events(response):
    for block in response.text.strip().split("\n\n"):
        kind, data = block.split("\n")
        body = json.loads(data.removeprefix("data: "))
        assert kind == f"event: {body['type']}"
        yield body


def test_a_message_has_anthropics_shape(tokenizer):
    answer = post(tokenizer, HELLO).json()
    assert answer.pop("id").startswith("msg_")
    assert answer == {
        "type": "message", "role": "assistant", "model": MODEL, "content": [{"type": "text", "text": "Hello!"}],
        "stop_reason": "end_turn", "stop_sequence": None,
        "usage": usage(7),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "extra", "reason", "stop"),
    [
        (says("Hello!", end=None), {}, "max_tokens", None),
        (says("one two"), {"stop_sequences": ["x", " "]}, "stop_sequence", " "),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_reason_of_the_end(tokenizer, backend, extra, reason, stop, stream):
    response = post(tokenizer, HELLO | extra | {"stream": stream}, backend)
    if stream:
        [found] = [body["delta"] for body in named_events(response) if body["type"] == "message_delta"]
    else:
        found = response.json()
    assert (found["stop_reason"], found["stop_sequence"]) == (reason, stop)


def test_a_stream_has_anthropics_events(tokenizer):
    events = list(named_events(post(tokenizer, HELLO | {"stream": True})))
    assert [body["type"] for body in events] == [
        "message_start", "content_block_start", *["content_block_delta"] * 6, "content_block_stop", "message_delta",
        "message_stop",
    ]  # fmt: skip
    assert events[0]["message"]["content"] == []
    assert events[0]["message"]["usage"] == usage(0)
    assert events[1] == {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    assert "".join(body["delta"]["text"] for body in events[2:8]) == "Hello!"
    assert events[-2]["usage"] == usage(7)


def test_tokens_that_the_cache_had_are_told_apart(tokenizer):
    cached = says("Hello!")
    cached.script = [replace(update, cached_tokens=16) for update in cached.script]
    assert post(tokenizer, HELLO, cached).json()["usage"] == usage(7, 16)
    events = list(named_events(post(tokenizer, HELLO | {"stream": True}, cached)))
    assert events[0]["message"]["usage"] == usage(0, 16)
    assert events[-2]["usage"] == usage(7, 16)


def test_an_error_inside_a_stream_is_an_event_of_anthropics(tokenizer):
    broken = EchoBackend(script=[SequenceUpdate(request_id="a", token_ids=(64,)), ShardUnavailable("a shard is gone")])
    *_, last = named_events(post(tokenizer, HELLO | {"stream": True}, broken))
    assert last == {"type": "error", "error": {"type": "overloaded_error", "message": "a shard is gone"}}


@pytest.mark.parametrize(
    ("body", "status", "kind", "word"),
    [
        ({**HELLO, "max_tokens": 0}, 400, "invalid_request_error", "max_tokens"),
        ({k: v for k, v in HELLO.items() if k != "max_tokens"}, 400, "invalid_request_error", "max_tokens"),
        ({**HELLO, "model": "claude"}, 404, "not_found_error", "claude"),
        ({**HELLO, "messages": []}, 400, "invalid_request_error", "0 messages"),
        ({**HELLO, "messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, 400,
         "invalid_request_error", "messages"),
        ({**HELLO, "messages": [{"role": "user", "content": [
            {"type": "tool_use", "id": "1", "name": "f", "input": {}}]}]}, 400, "invalid_request_error", "assistant"),
        ({**HELLO, "tool_choice": {"type": "tool"}}, 400, "invalid_request_error", "name"),
        ({**HELLO, "thinking": {"type": "enabled"}}, 400, "invalid_request_error", "thinking"),
    ],
)  # fmt: skip
def test_bad_bodies_are_refused_in_anthropics_shape(tokenizer, body, status, kind, word):
    response = post(tokenizer, body)
    error = response.json()
    assert (response.status_code, error["type"], error["error"]["type"]) == (status, "error", kind)
    assert word in error["error"]["message"]


def test_a_full_server_is_refused_in_anthropics_shape(tokenizer):
    response = asyncio.run(Front(tokenizer, room=0).post(PATH, HELLO))
    assert (response.status_code, response.json()["error"]["type"]) == (429, "rate_limit_error")


def test_another_servers_answer_is_taken_as_a_turn(tokenizer):
    """A client sends all fields of an answer back, also those that are null."""
    text = {"type": "text", "text": "Well.", "citations": None}
    call = {"type": "tool_use", "id": "t1", "name": "add", "input": {}, "caller": {"type": "direct"}}
    turns = [
        {"role": "assistant", "content": [text, call]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "3"}]},
    ]
    body = HELLO | {"messages": [*HELLO["messages"], *turns], "thinking": {"type": "disabled"},
                    "cache_control": {"type": "ephemeral"}}  # fmt: skip
    response = asyncio.run(Front(tokenizer, says("Hello!"), max_model_len=400).post(PATH, body))
    assert response.status_code == 200, response.text


def test_tools_and_their_answers_become_the_templates_turns():
    body = MessagesRequest.model_validate({
        **HELLO, "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        "tools": [{"name": "add", "description": "adds", "input_schema": {"type": "object"}}],
        "messages": [
            {"role": "user", "content": "1 + 2?"},
            {"role": "assistant", "content": [
                {"type": "text", "text": "Let me see."},
                {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 1, "b": 2}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "3"}]},
                {"type": "text", "text": "So?"}]},
        ],
    })  # fmt: skip
    chat = to_conversation(ChatRequest(**_prompt_fields(body)))
    assert chat.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [
            {"id": "t1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}]},
        {"role": "tool", "content": "3", "tool_call_id": "t1"},
        {"role": "user", "content": "So?"},
    ]  # fmt: skip
    assert chat.tools == [
        {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}
    ]


def test_an_answer_that_is_begun_is_gone_on_with(tokenizer):
    backend = says("lo")
    post(tokenizer, HELLO | {"messages": [*HELLO["messages"], {"role": "assistant", "content": "Hel"}]}, backend)
    [asked] = backend.requests
    assert asked.prompt_token_ids[-3:] == byte_ids("Hel")


def test_tokens_are_counted_as_the_message_has_them(tokenizer):
    body = {"model": MODEL, "messages": HELLO["messages"]}
    assert post(tokenizer, body, path=f"{PATH}/count_tokens").json() == {"input_tokens": NUM_PROMPT_TOKENS}


ADD = {"name": "add", "description": "adds", "input_schema": {"type": "object"}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


@pytest.mark.parametrize("stream", [False, True])
def test_a_called_tool_is_a_block_of_its_own(tokenizer, stream):
    body = HELLO | {"max_tokens": 30, "tools": [ADD], "stream": stream}
    response = asyncio.run(Front(tokenizer, says("Well. " + CALL), max_model_len=400).post(PATH, body))
    if not stream:
        text, call = response.json()["content"]
        assert response.json()["stop_reason"] == "tool_use"
    else:
        events = list(named_events(response))
        text, call = [body["content_block"] for body in events if body["type"] == "content_block_start"]
        deltas = [(body["index"], body["delta"]) for body in events if body["type"] == "content_block_delta"]
        text["text"] = "".join(delta["text"] for index, delta in deltas if index == 0)
        call["input"] = json.loads("".join(delta["partial_json"] for index, delta in deltas if index == 1))
        assert [body["delta"]["stop_reason"] for body in events if body["type"] == "message_delta"] == ["tool_use"]
        assert [body["index"] for body in events if body["type"] == "content_block_stop"] == [0, 1]
    assert text["text"].strip() == "Well."
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "add", {"a": 1})


def test_anthropics_own_client_reads_all_of_it(tokenizer):
    async def run():
        front = Front(tokenizer, says("Hello!"))
        async with front.client() as http:
            client = anthropic.AsyncAnthropic(api_key="k", base_url="http://server", http_client=http, max_retries=0)
            message = await client.messages.create(**HELLO)
            assert (message.content[0].text, message.usage.output_tokens) == ("Hello!", 7)
            async with client.messages.stream(**HELLO) as stream:
                assert "".join([text async for text in stream.text_stream]) == "Hello!"
                assert (await stream.get_final_message()).stop_reason == "end_turn"
            counted = await client.messages.count_tokens(model=MODEL, messages=HELLO["messages"])
            assert counted.input_tokens == NUM_PROMPT_TOKENS
            with pytest.raises(anthropic.NotFoundError, match="claude"):
                await client.messages.create(**HELLO | {"model": "claude"})

    asyncio.run(run())


def test_arguments_that_are_no_object_are_none():
    assert _object('{"a": [1]}') == {"a": [1]}
    for text in ('{"a": ', "[1]", '{"a": ' + "[" * 100_000):
        assert _object(text) == {}
