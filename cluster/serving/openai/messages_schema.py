"""The bodies of `/v1/messages`. Source: Anthropic's API reference."""

from typing import Annotated, Any, Literal

from pydantic import Field

from cluster.serving.openai.base_schema import AnswerBody, RequestBody
from cluster.types import Usage


class CacheControl(RequestBody):
    """Without effect: equal beginnings of prompts are found without it."""

    type: str
    ttl: str | None = None


class TextBlock(RequestBody):
    """citations: without effect; another server's answer may come back with them."""

    type: Literal["text"]
    text: str
    citations: list[Any] | None = None
    cache_control: CacheControl | None = None


class ToolUseBlock(RequestBody):
    """A tool that the assistant called. caller: without effect, as citations."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    caller: dict[str, Any] | None = None
    cache_control: CacheControl | None = None


class ToolResultBlock(RequestBody):
    """A tool's answer. is_error: the model is not told."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None


Block = Annotated[TextBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")]


class Turn(RequestBody):
    role: Literal["user", "assistant"]
    content: str | list[Block]


class ToolDefinition(RequestBody):
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    cache_control: CacheControl | None = None


class ToolChoice(RequestBody):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class NoThinking(RequestBody):
    type: Literal["disabled"]


class CountTokensRequest(RequestBody):
    """The prompt's part of a request. thinking: no more than that there is none.  cache_control: without effect."""

    model: str
    messages: list[Turn]
    system: str | list[TextBlock] | None = None
    tools: list[ToolDefinition] | None = None
    tool_choice: ToolChoice | None = None
    thinking: NoThinking | None = None
    cache_control: CacheControl | None = None


class MessagesRequest(CountTokensRequest):
    """metadata, service_tier: without effect."""

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None


class MessagesUsage(AnswerBody):
    """The prompt's tokens are the sum of the first three. cache_read_input_tokens: those at its beginning that the
    cache had.  cache_creation_input_tokens: none, for no request orders a cache.  input_tokens: the others."""

    input_tokens: int = 0
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0
    output_tokens: int = 0

    @classmethod
    def of(cls, usage: Usage) -> "MessagesUsage":
        return cls(
            input_tokens=usage.prompt_tokens - usage.cached_tokens,
            cache_read_input_tokens=usage.cached_tokens,
            output_tokens=usage.completion_tokens,
        )


class MessageAnswer(AnswerBody):
    """content: blocks of type text or tool_use."""

    id: str
    type: str = "message"
    role: str = "assistant"
    model: str
    content: list[dict[str, Any]]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessagesUsage


class TokenCount(AnswerBody):
    input_tokens: int
