"""Takes whole calls of tools out of an answer, their arguments as objects: for those who show or answer them."""

import json
from collections.abc import Iterable, Iterator

from cluster.conversation import ToolCall
from cluster.serving.tools.hermes import Arguments, CallBegins, Event, HermesReader, Text


class WholeCalls:
    """Of one answer. Calls get ids, call_0 and so on: a tool's turn answers one by its id."""

    def __init__(self) -> None:
        self._reader = HermesReader()
        self._call: CallBegins | None = None
        self._arguments = ""

    def feed(self, text: str) -> Iterable[str | ToolCall]:
        return self._parts(self._reader.push(text))

    def end(self) -> Iterable[str | ToolCall]:
        yield from self._parts(self._reader.end())
        yield from self._whole()

    def _parts(self, events: Iterable[Event]) -> Iterator[str | ToolCall]:
        for event in events:
            if isinstance(event, Arguments):
                self._arguments += event.text
                continue
            yield from self._whole()
            if isinstance(event, Text):
                yield event.text
            else:
                self._call = event

    def _whole(self) -> Iterator[str | ToolCall]:
        """The call before this place, if there is one; as text, if its arguments were cut off."""
        call, arguments = self._call, self._arguments
        self._call, self._arguments = None, ""
        if call is None:
            return
        try:
            read = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            read = None
        if isinstance(read, dict):
            yield ToolCall(name=call.name, arguments=read, id=f"call_{call.number}")
        else:
            yield f"{call.name} {arguments}"


def read_calls(text: str) -> tuple[str, tuple[ToolCall, ...]]:
    """The content of a whole answer, and its calls."""
    reader = WholeCalls()
    parts = [*reader.feed(text), *reader.end()]
    content = "".join(part for part in parts if isinstance(part, str))
    return content, tuple(part for part in parts if isinstance(part, ToolCall))
