"""LangChain's ChatOpenAI and OpenAIEmbeddings. Run by test_clients.py as `python FILE URL MODEL EXPECTED`.

EXPECTED: the text that gRPC gives for MESSAGE, 12 tokens, greedy.
"""

import asyncio
import sys

from langchain_core.messages import ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

URL, MODEL, EXPECTED = sys.argv[1:]
MESSAGE = "Which experts answered?"
SERVER = {"model": MODEL, "base_url": f"{URL}/v1", "api_key": "any", "max_retries": 0}
greedy = ChatOpenAI(**SERVER, temperature=0, max_tokens=12, extra_body={"repetition_penalty": 1.0, "ignore_eos": True})
forced = ChatOpenAI(**SERVER, temperature=1, seed=3, max_tokens=600)


class Report(BaseModel):
    """About one layer."""

    layer: int = Field(ge=0, le=23)
    busy: bool


@tool(args_schema=Report)
def look_at(layer: int, busy: bool) -> str:
    """Looks at a layer."""
    return f"layer {layer}: {busy}"


def plain_answers() -> None:
    answer = greedy.invoke(MESSAGE)
    assert answer.content == EXPECTED, answer
    assert answer.usage_metadata["output_tokens"] == 12, answer
    assert answer.response_metadata["finish_reason"] == "length", answer
    assert [one.content for one in greedy.batch([MESSAGE] * 6)] == [EXPECTED] * 6


def streams() -> None:
    chunks = list(greedy.stream(MESSAGE, stream_usage=True))
    assert "".join(chunk.content for chunk in chunks) == EXPECTED, chunks
    assert sum((chunk.usage_metadata or {}).get("output_tokens", 0) for chunk in chunks) == 12, chunks

    async def gathered() -> str:
        return "".join([chunk.content async for chunk in greedy.astream(MESSAGE)])

    assert asyncio.run(gathered()) == EXPECTED


def tools() -> None:
    model = forced.bind_tools([look_at], tool_choice="required", parallel_tool_calls=False, strict=True)
    answer = model.invoke(MESSAGE)
    [call] = answer.tool_calls
    assert call["name"] == "look_at", answer
    assert {name: type(value) for name, value in call["args"].items()} == {"layer": int, "busy": bool}, answer
    whole = None
    for chunk in model.stream(MESSAGE):
        whole = chunk if whole is None else whole + chunk
    assert [one["args"] for one in whole.tool_calls] == [call["args"]], whole
    result = look_at.invoke(call)
    assert isinstance(result, ToolMessage), result
    after = greedy.bind_tools([look_at]).invoke([("user", MESSAGE), answer, result])
    assert after.usage_metadata["input_tokens"] > 40, after


def structured() -> None:
    for method in ("json_schema", "function_calling"):
        found = forced.with_structured_output(Report, method=method, strict=True).invoke(MESSAGE)
        assert isinstance(found, Report), (method, found)


def embeddings() -> None:
    """Texts go as they are: without the option LangChain makes ids of them, for OpenAI's own models."""
    vectors = OpenAIEmbeddings(**SERVER, check_embedding_ctx_length=False).embed_documents(["one", "two"])
    assert len(vectors) == 2, vectors
    assert abs(sum(x * x for x in vectors[0]) - 1) < 1e-5, vectors


for check in (plain_answers, streams, tools, structured, embeddings):
    check()
