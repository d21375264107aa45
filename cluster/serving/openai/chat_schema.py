"""The bodies of `/v1/chat/completions`. Source: OpenAI's API reference; `chat_template_kwargs` and below are vLLM's."""

from typing import Annotated, Any, Literal

from pydantic import Field

from cluster.serving.openai.base_schema import AnswerBody, PromptLogprobs, RequestBody, SamplingFields, UsageBody
from cluster.types import MAX_TOP_LOGPROBS

Role = Literal["system", "developer", "user", "assistant", "tool", "function"]


class ContentPart(RequestBody):
    """A part of a content. This model reads texts: any other kind is refused by name."""

    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None


class CalledFunction(RequestBody):
    """parsed_arguments: without effect; OpenAI's client adds them to an answer that it has parsed."""

    name: str
    arguments: str = ""  # JSON
    parsed_arguments: Any = None


class CalledTool(RequestBody):
    """index: without effect; of a call that was gathered from a stream."""

    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class MessageBody(RequestBody):
    """Those behind `reasoning` are without effect: an assistant's answer comes back as a client has read it,
    from this server or from another one."""

    role: Role
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[CalledTool] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    parsed: Any = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class FunctionBody(RequestBody):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(RequestBody):
    type: Literal["function"]
    function: FunctionBody


class NamedTool(RequestBody):
    type: Literal["function"]
    function: dict[str, str]


class ChatRequest(SamplingFields):
    messages: list[MessageBody]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: list[ToolBody] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    # Without effect: this model writes no reasoning, its cache finds beginnings by itself, and keys name clients.
    include_reasoning: bool | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @property
    def length_field(self) -> str:
        """Returns the name of the field that bounds the answer."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"


class TopLogprob(AnswerBody):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(AnswerBody):
    content: list[TokenLogprob]


class AnswerMessage(AnswerBody):
    """An assistant's turn. As a delta it has only the fields that are new."""

    role: str | None = None
    content: str | None = None
    refusal: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChatChoice(AnswerBody):
    """stop_reason: vLLM's; the stop string that ended it, left out for another end."""

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: str | None
    stop_reason: str | None = None
    token_ids: list[int] | None = None


class ChatAnswer(AnswerBody):
    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageBody
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class ChunkChoice(AnswerBody):
    index: int
    delta: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: str | None
    stop_reason: str | None = None
    token_ids: list[int] | None = None


class ChatChunk(AnswerBody):
    id: str
    object: str
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: UsageBody | None = None
    prompt_token_ids: list[int] | None = None
