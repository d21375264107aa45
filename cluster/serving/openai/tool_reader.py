"""Calls of tools in a chat's answer, whole and as deltas, in OpenAI's words; the form that `tool_choice` asks for."""

from typing import Any

from cluster.serving.openai.chat_schema import AnswerMessage, ChatRequest, NamedTool
from cluster.serving.tools.choice import ToolChoice
from cluster.serving.tools.reader import CallPiece, CallReader
from cluster.structured import FIELD, StructuredOutputsParams
from cluster.types import FinishReason


class ToolReader:
    """A `MessageReader` of one choice."""

    def __init__(self, choice: ToolChoice) -> None:
        self._reader = CallReader(choice)

    def read(self, text: str) -> list[AnswerMessage]:
        return [_delta(piece) for piece in self._reader.read(text)]

    def end(self) -> list[AnswerMessage]:
        return [_delta(piece) for piece in self._reader.end()]

    def whole(self) -> AnswerMessage:
        content = self._reader.content
        calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in self._reader.calls
        ]
        if not calls:
            return AnswerMessage(role="assistant", content=content, refusal=None)
        return AnswerMessage(role="assistant", content=content or None, refusal=None, tool_calls=calls)

    def finish_reason(self, reason: FinishReason) -> str:
        return "tool_calls" if self._reader.ended_by_calls(reason) else reason


def tool_reader(body: ChatRequest) -> ToolReader | None:
    """None for a request whose answer calls no tools."""
    choice = _choice(body)
    return ToolReader(choice) if body.tools and choice.mode != "none" else None


def chosen_form(body: ChatRequest) -> StructuredOutputsParams | None:
    """The form of the answer: of the calls that `tool_choice` asks for, else the one that the request has.

    Raises InvalidRequest.
    """
    return _choice(body).form([tool.model_dump(exclude_none=True) for tool in body.tools or ()], body.form())


def form_field(body: ChatRequest) -> str:
    """Returns the name of the field that asks for the answer's form."""
    given = body.form_field
    of_calls = given == FIELD and body.structured_outputs is None and _choice(body).mode == "required"
    return "tools" if of_calls else given


def _choice(body: ChatRequest) -> ToolChoice:
    given: Any = body.tool_choice
    if isinstance(given, NamedTool):
        given = given.model_dump()
    return ToolChoice.of(given, several=body.parallel_tool_calls is not False)


def _delta(piece: str | CallPiece) -> AnswerMessage:
    if isinstance(piece, str):
        return AnswerMessage(content=piece)
    if piece.id:
        function = {"name": piece.name, "arguments": ""}
        return AnswerMessage(
            tool_calls=[{"index": piece.index, "id": piece.id, "type": "function", "function": function}]
        )
    return AnswerMessage(tool_calls=[{"index": piece.index, "function": {"arguments": piece.arguments}}])
