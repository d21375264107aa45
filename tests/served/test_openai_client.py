"""All that programs do with OpenAI's Python client, on the served application; the answers are those of gRPC."""

import asyncio
import json

import openai
import pytest
import served_tools
from served_tools import MESSAGES, Report

pytestmark = pytest.mark.ray

MODEL = "demo-moe"
GREEDY = {"model": MODEL, **served_tools.GREEDY}
RANDOM = {"model": MODEL, "temperature": 1, "seed": 4, "max_tokens": 700}


def test_an_async_client_streams_many_chats_at_once(served, expected):
    async def one(client):
        pieces = []
        stream = await client.chat.completions.create(messages=MESSAGES, max_tokens=12, stream=True, **GREEDY)
        async for chunk in stream:
            pieces.append(chunk.choices[0].delta.content or "")
        return "".join(pieces)

    async def many():
        async with openai.AsyncOpenAI(base_url=f"{served.http_url}/v1", api_key="any", max_retries=0) as client:
            return await asyncio.gather(*(one(client) for _ in range(8)))

    assert asyncio.run(many()) == [expected.text] * 8


def test_the_helper_for_streams_gathers_the_whole_answer(client):
    """Its typed events: each piece, the whole text, the snapshot with usage and log-probabilities."""
    options = {"logprobs": True, "top_logprobs": 2, "stream_options": {"include_usage": True}}
    form = {"extra_body": {"structured_outputs": {"choice": ["the experts answered"]}}}
    with client.chat.completions.stream(model=MODEL, messages=MESSAGES, **form, **options) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    assert (final.choices[0].message.content, final.choices[0].finish_reason) == ("the experts answered", "stop")
    tokens = [entry.token for entry in final.choices[0].logprobs.content]
    assert len(tokens) == final.usage.completion_tokens > 1
    assert "".join(tokens).startswith("the experts answered")
    pieces = [event.delta for event in events if event.type == "content.delta"]
    assert len(pieces) > 1
    assert "".join(pieces) == "the experts answered"
    assert [event.content for event in events if event.type == "content.done"] == ["the experts answered"]


def test_an_answer_is_parsed_into_a_model(client):
    [choice] = client.chat.completions.parse(messages=MESSAGES, response_format=Report, **RANDOM).choices
    assert isinstance(choice.message.parsed, Report)
    assert Report.model_validate_json(choice.message.content) == choice.message.parsed
    with client.chat.completions.stream(messages=MESSAGES, response_format=Report, **RANDOM) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == choice.message.parsed


def test_a_tool_is_called_and_its_answer_read(client):
    tool = openai.pydantic_function_tool(Report, name="report")
    choice = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
    first = client.chat.completions.parse(messages=MESSAGES, **choice, **RANDOM).choices[0]
    [call] = first.message.tool_calls
    assert isinstance(call.function.parsed_arguments, Report)
    assert first.finish_reason == "tool_calls"
    turns = [*MESSAGES, first.message, {"role": "tool", "tool_call_id": call.id, "content": json.dumps({"ok": True})}]
    second = client.chat.completions.create(messages=turns, tools=[tool], max_tokens=8, **GREEDY)
    assert second.choices[0].finish_reason == "length"
    assert second.usage.prompt_tokens > 40


def test_completions_whole_and_as_streams(client):
    ask = {"prompt": "Once upon a time", "max_tokens": 10, **GREEDY}
    whole = client.completions.create(**ask, echo=True, logprobs=1).choices[0]
    with client.completions.create(**ask, stream=True) as stream:
        text = "".join(chunk.choices[0].text for chunk in stream)
    assert whole.text == f"Once upon a time{text}"
    assert "".join(whole.logprobs.tokens) == whole.text


def test_embeddings_come_in_base64_as_the_client_asks_for_them(client):
    """It asks for base64 by itself, and decodes it."""
    both = client.embeddings.create(model=MODEL, input=["one", "two"])
    plain = client.embeddings.create(model=MODEL, input="two", encoding_format="float")
    assert [len(one.embedding) for one in both.data] == [len(plain.data[0].embedding)] * 2
    assert both.data[1].embedding == pytest.approx(plain.data[0].embedding, abs=1e-6)
    assert sum(x * x for x in both.data[0].embedding) == pytest.approx(1, abs=1e-5)


def test_models_and_their_names(client):
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")


def test_raw_answers_and_errors_have_the_calls_name(client):
    """Serve's server makes it, or the client; the answer's id has it, and so has the server's log."""
    raw = client.chat.completions.with_raw_response.create(messages=MESSAGES, max_tokens=2, **GREEDY)
    answer = raw.parse()
    assert raw.http_response.headers["content-type"] == "application/json"
    assert answer.id == f"chatcmpl-{raw.request_id}"
    given = {"extra_headers": {"x-request-id": "mine-7"}}
    assert client.completions.create(prompt="a", max_tokens=1, **GREEDY, **given).id == "cmpl-mine-7"
    with client.chat.completions.with_streaming_response.create(messages=MESSAGES, max_tokens=2, **GREEDY) as body:
        assert json.loads("".join(body.iter_lines()))["object"] == "chat.completion"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(messages=MESSAGES, max_tokens=-1, **GREEDY)
    assert refused.value.request_id
    assert (refused.value.param, refused.value.status_code) == ("max_tokens", 400)
