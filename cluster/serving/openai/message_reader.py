"""The seam for the meaning of a model's text: content alone here, calls of tools in `tool_reader`."""

from collections.abc import Sequence
from typing import Any, Protocol

from cluster.serving.openai.chat_schema import AnswerMessage, ChatRequest
from cluster.serving.openai.tool_reader import tool_reader
from cluster.types import FinishReason


class MessageReader(Protocol):
    """Reads one choice's text as it comes, and makes the parts of an assistant's message of it."""

    def read(self, text: str) -> list[AnswerMessage]:
        """Returns the deltas that a piece of text brings; none while it may still mean something else."""

    def end(self) -> list[AnswerMessage]:
        """Returns the deltas that were held back."""

    def whole(self) -> AnswerMessage:
        """Returns the message, after `end`."""

    def finish_reason(self, reason: FinishReason) -> str:
        """Returns OpenAI's word for the reason of the end, after `end`."""


class PlainReader:
    """All text is content."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def read(self, text: str) -> list[AnswerMessage]:
        self._texts.append(text)
        return [AnswerMessage(content=text)] if text else []

    def end(self) -> list[AnswerMessage]:
        return []

    def whole(self) -> AnswerMessage:
        return AnswerMessage(role="assistant", content="".join(self._texts), refusal=None)

    def finish_reason(self, reason: FinishReason) -> str:
        return reason


def joined(parts: Sequence[AnswerMessage]) -> AnswerMessage:
    """Returns one delta that says what several say. A call's pieces are one, as its reader would join them."""
    content = "".join(part.content or "" for part in parts)
    calls: dict[int, dict[str, Any]] = {}
    for piece in (piece for part in parts for piece in part.tool_calls or ()):
        if (call := calls.get(piece["index"])) is None:
            calls[piece["index"]] = {**piece, "function": dict(piece["function"])}
        else:
            call["function"]["arguments"] += piece["function"]["arguments"]
    if not calls:
        return AnswerMessage(content=content)
    texts = {"content": content} if content else {}
    return AnswerMessage(**texts, tool_calls=list(calls.values()))


def reader_for(body: ChatRequest) -> MessageReader:
    """Returns a reader for one choice of a request."""
    return tool_reader(body) or PlainReader()
