"""Takes calls of tools out of one answer while it comes. Knows no front's words for them."""

import uuid
from collections.abc import Iterable
from dataclasses import dataclass

from cluster.serving.tools.choice import ToolChoice
from cluster.serving.tools.hermes import Arguments, CallBegins, Event, HermesReader, Text
from cluster.types import FinishReason


@dataclass(slots=True)
class Call:
    """A call, as far as it has come. arguments: JSON, as the model wrote it."""

    id: str
    name: str
    arguments: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallPiece:
    """News of a call. id, name: in a call's first piece, which has no arguments yet."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


class CallReader:
    """Of one answer. content: the text without the calls."""

    def __init__(self, choice: ToolChoice) -> None:
        self._reader = HermesReader()
        self._choice = choice
        self._texts: list[str] = []
        self.calls: list[Call] = []

    @property
    def content(self) -> str:
        return "".join(self._texts)

    def read(self, text: str) -> list[str | CallPiece]:
        """Takes a piece of the answer; returns what is certain now: pieces of content, and of calls."""
        return list(self._pieces(self._reader.push(text)))

    def end(self) -> list[str | CallPiece]:
        """Returns what was held back, at the answer's end."""
        return list(self._pieces(self._reader.end()))

    def ended_by_calls(self, reason: FinishReason) -> bool:
        """Whether the model chose to call, or which function, and ended there: OpenAI's "tool_calls". After `end`."""
        return bool(self.calls) and reason == "stop" and self._choice.name is None

    def _pieces(self, events: list[Event]) -> Iterable[str | CallPiece]:
        for event in events:
            if isinstance(event, Text):
                if self._choice.mode == "required":  # it must be calls: the rest of one that was cut off
                    continue
                self._texts.append(event.text)
                yield event.text
            elif event.number and not self._choice.several:
                continue
            elif isinstance(event, CallBegins):
                call = Call(id=f"call_{uuid.uuid4().hex[:24]}", name=event.name)
                self.calls.append(call)
                yield CallPiece(index=event.number, id=call.id, name=call.name)
            else:
                assert isinstance(event, Arguments), "an event is one of three"
                self.calls[event.number].arguments += event.text
                yield CallPiece(index=event.number, arguments=event.text)
