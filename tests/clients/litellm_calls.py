"""LiteLLM, as provider `openai/` and `hosted_vllm/`. Run by test_clients.py as `python FILE URL MODEL EXPECTED`.

EXPECTED: the text that gRPC gives for the message, 12 tokens, greedy.
"""

import asyncio
import json
import sys

import litellm

URL, MODEL, EXPECTED = sys.argv[1:]
MESSAGES = [{"role": "user", "content": "Which experts answered?"}]
SERVER = {"api_base": f"{URL}/v1", "api_key": "any", "num_retries": 0}
GREEDY = {"temperature": 0, "max_tokens": 12, "extra_body": {"repetition_penalty": 1.0, "ignore_eos": True}}
TOOL = {
    "type": "function",
    "function": {
        "name": "look_at",
        "parameters": {
            "type": "object",
            "properties": {"layer": {"type": "integer", "minimum": 0, "maximum": 23}},
            "required": ["layer"],
            "maxProperties": 1,  # LiteLLM leaves additionalProperties out for hosted_vllm
        },
    },
}


def answers(model: str) -> None:
    answer = litellm.completion(model=model, messages=MESSAGES, **SERVER, **GREEDY)
    assert answer.choices[0].message.content == EXPECTED, answer
    assert answer.usage.completion_tokens == 12, answer
    usage = {"include_usage": True}
    chunks = list(
        litellm.completion(model=model, messages=MESSAGES, stream=True, stream_options=usage, **SERVER, **GREEDY)
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == EXPECTED, chunks
    whole = litellm.stream_chunk_builder(chunks)
    assert (whole.choices[0].message.content, whole.usage.completion_tokens) == (EXPECTED, 12), whole


async def at_once(model: str) -> None:
    calls = [litellm.acompletion(model=model, messages=MESSAGES, **SERVER, **GREEDY) for _ in range(6)]
    assert [one.choices[0].message.content for one in await asyncio.gather(*calls)] == [EXPECTED] * 6
    text = ""
    async for chunk in await litellm.acompletion(model=model, messages=MESSAGES, stream=True, **SERVER, **GREEDY):
        text += chunk.choices[0].delta.content or ""
    assert text == EXPECTED, text


def tools(model: str) -> None:
    asked = {
        "tools": [TOOL],
        "tool_choice": "required",
        "temperature": 1,
        "seed": 3,
        "max_tokens": 400,
        "parallel_tool_calls": False,
    }
    first = litellm.completion(model=model, messages=MESSAGES, **SERVER, **asked).choices[0].message
    for call in first.tool_calls:
        assert call.function.name == "look_at", first
        assert isinstance(json.loads(call.function.arguments)["layer"], int), first
    results = [{"role": "tool", "tool_call_id": call.id, "content": "busy"} for call in first.tool_calls]
    turns = [*MESSAGES, first.model_dump(), *results]
    after = litellm.completion(model=model, messages=turns, tools=[TOOL], **SERVER, **GREEDY)
    assert after.choices[0].finish_reason == "length", after


def others(model: str) -> None:
    vectors = litellm.embedding(model=model, input=["one", "two"], encoding_format="float", **SERVER).data
    assert [round(sum(x * x for x in one["embedding"]), 4) for one in vectors] == [1, 1], vectors
    text = litellm.text_completion(model=model, prompt="Once upon", **SERVER, **GREEDY)
    assert text.choices[0].text, text
    refused(litellm.BadRequestError, "max_tokens", model=model, max_tokens=-1)
    refused(litellm.NotFoundError, "not served here", model=f"{model}-2")


def refused(kind: type[Exception], word: str, **fields: object) -> None:
    found: Exception | None = None
    try:
        litellm.completion(messages=MESSAGES, **fields, **SERVER)
    except kind as error:
        found = error
    assert word in str(found), found


for provider in ("openai", "hosted_vllm"):
    answers(f"{provider}/{MODEL}")
    asyncio.run(at_once(f"{provider}/{MODEL}"))
    tools(f"{provider}/{MODEL}")
    others(f"{provider}/{MODEL}")
