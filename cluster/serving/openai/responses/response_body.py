"""A response as clients read it. Source: OpenAI's API reference."""

import json
from typing import Any

from cluster.errors import ClusterError, InvalidRequest, Overloaded, ReplicaUnavailable
from cluster.serving.openai.body import AnswerBody
from cluster.serving.openai.errors import body_of
from cluster.serving.openai.responses.schema import ResponseRequest
from cluster.serving.openai.responses.store import StoredResponse
from cluster.types import Usage

ENDED = ("completed", "incomplete", "failed", "cancelled")


class ResponseUsage(AnswerBody):
    """cache_write_tokens, reasoning_tokens: OpenAI's clients need them; neither is counted here."""

    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int

    @classmethod
    def of(cls, usage: Usage) -> "ResponseUsage":
        return cls(
            input_tokens=usage.prompt_tokens,
            input_tokens_details={"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            output_tokens=usage.completion_tokens,
            output_tokens_details={"reasoning_tokens": 0},
            total_tokens=usage.prompt_tokens + usage.completion_tokens,
        )


class ResponseBody(AnswerBody):
    """output: items of type message or function_call. A field that was not asked for is null."""

    id: str
    object: str = "response"
    created_at: int
    completed_at: int | None = None
    status: str
    background: bool
    error: dict[str, str] | None = None
    incomplete_details: dict[str, str] | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: list[dict[str, Any]]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: dict[str, str | None]
    safety_identifier: str | None
    service_tier: str = "default"
    store: bool
    temperature: float | None
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float | None
    truncation: str
    usage: ResponseUsage | None = None
    user: str | None

    def failed(self, error: Exception) -> "ResponseBody":
        """The same response after an error that ended it."""
        return self.model_copy(update={"status": "failed", "error": error_of(error, self.id)})


def begin(body: ResponseRequest, *, response_id: str, model: str, created_at: int, store: bool) -> ResponseBody:
    """A response before its first token. Raises InvalidRequest."""
    form = body.text.format if body.text is not None else None
    choice = body.tool_choice or "auto"
    response = ResponseBody(
        id=response_id,
        created_at=created_at,
        status="queued" if body.background else "in_progress",
        background=bool(body.background),
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        max_tool_calls=body.max_tool_calls,
        metadata=body.metadata or {},
        model=model,
        output=[],
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        prompt_cache_key=body.prompt_cache_key,
        reasoning={"effort": None, "summary": None},
        safety_identifier=body.safety_identifier,
        store=store,
        temperature=body.temperature,
        text={"format": {"type": "text"} if form is None else form.model_dump(by_alias=True)},
        tool_choice=choice if isinstance(choice, str) else choice.model_dump(),
        tools=[tool.model_dump() for tool in body.tools or ()],
        top_logprobs=body.top_logprobs or 0,
        top_p=body.top_p,
        truncation=body.truncation or "disabled",
        user=body.user,
    )
    try:
        return ResponseBody.model_validate(json.loads(response.model_dump_json()))  # as all will read it
    except ValueError:
        message = "the request is given back, and cannot be written as JSON: it is too deep, or has half a character"
        raise InvalidRequest(message, "request") from None


def error_of(error: Exception, response_id: str) -> dict[str, str]:
    """An error as a response has it. The codes are OpenAI's."""
    code = "server_error"
    if isinstance(error, ClusterError) and error.public:
        code = {Overloaded: "rate_limit_exceeded", InvalidRequest: "invalid_prompt"}.get(type(error), code)
    return {"code": code, "message": body_of(error, response_id)["error"]["message"]}


def as_stored(stored: StoredResponse) -> ResponseBody:
    """A response out of the store, which may know of an end that came after its text."""
    response = ResponseBody.model_validate(json.loads(stored.response))
    if response.status in ENDED or not stored.ending:
        return response
    if stored.ending == "cancelled":
        return response.model_copy(update={"status": "cancelled"})
    return response.failed(ReplicaUnavailable("the process that made this response is gone: ask again"))
