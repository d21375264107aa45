"""The events of a response's stream, as the OpenAPI document has them; `writing.py` and `making.py` make them as plain
JSON. Source: OpenAI's API reference, "Streaming events"."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, RootModel

from cluster.serving.openai.body import AnswerBody
from cluster.serving.openai.responses.response_body import ResponseBody


class _Event(AnswerBody):
    model_config = ConfigDict(extra="forbid")
    sequence_number: int


class WholeEvent(_Event):
    """The response as it is at that moment."""

    type: Literal[
        "response.created",
        "response.queued",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    response: ResponseBody


class ItemEvent(_Event):
    """item: of type message or function_call."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: dict[str, Any]


class _OfItem(_Event):
    output_index: int
    item_id: str


class _OfPart(_OfItem):
    content_index: int


class PartEvent(_OfPart):
    """part: of type output_text."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    part: dict[str, Any]


class TextDeltaEvent(_OfPart):
    type: Literal["response.output_text.delta"]
    delta: str
    logprobs: list[dict[str, Any]]


class TextDoneEvent(_OfPart):
    type: Literal["response.output_text.done"]
    text: str
    logprobs: list[dict[str, Any]]


class ArgumentsDeltaEvent(_OfItem):
    type: Literal["response.function_call_arguments.delta"]
    delta: str


class ArgumentsDoneEvent(_OfItem):
    type: Literal["response.function_call_arguments.done"]
    name: str
    arguments: str


class ErrorEvent(_Event):
    """It ends a stream that broke; the response itself may go on."""

    type: Literal["error"]
    code: str | None
    message: str
    param: str | None


OneEvent = (
    WholeEvent | ItemEvent | PartEvent | TextDeltaEvent | TextDoneEvent | ArgumentsDeltaEvent | ArgumentsDoneEvent
)


class ResponseEvent(RootModel[Annotated[OneEvent, Field(discriminator="type")]]):
    """One event of a response but an error."""
