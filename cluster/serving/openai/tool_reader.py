"""Calls of tools in a chat's answer, whole and as deltas, in OpenAI's words; the form that `tool_choice` asks for."""

import uuid
from typing import Any

from cluster.errors import InvalidRequest
from cluster.serving.openai.chat_schema import AnswerMessage, ChatRequest, NamedTool
from cluster.serving.tools.forced import forced_calls
from cluster.serving.tools.hermes import Arguments, CallBegins, Event, HermesReader, Text
from cluster.structured import StructuredOutputsParams
from cluster.types import FinishReason


class ToolReader:
    """A `MessageReader` of one choice. several: whether it may call more than one function: the first counts."""

    def __init__(self, *, several: bool, named: bool) -> None:
        self._reader = HermesReader()
        self._several, self._named = several, named
        self._texts: list[str] = []
        self._calls: list[dict[str, Any]] = []

    def read(self, text: str) -> list[AnswerMessage]:
        return self._messages(self._reader.push(text))

    def end(self) -> list[AnswerMessage]:
        return self._messages(self._reader.end())

    def whole(self) -> AnswerMessage:
        content = "".join(self._texts)
        if not self._calls:
            return AnswerMessage(role="assistant", content=content, refusal=None)
        return AnswerMessage(role="assistant", content=content or None, refusal=None, tool_calls=self._calls)

    def finish_reason(self, reason: FinishReason) -> str:
        """As OpenAI's: "tool_calls" where the model chose to call, or which function."""
        return "tool_calls" if self._calls and reason == "stop" and not self._named else reason

    def _messages(self, events: list[Event]) -> list[AnswerMessage]:
        return [message for event in events if (message := self._message(event)) is not None]

    def _message(self, event: Event) -> AnswerMessage | None:
        if isinstance(event, Text):
            self._texts.append(event.text)
            return AnswerMessage(content=event.text)
        if event.number and not self._several:
            return None
        if isinstance(event, CallBegins):
            function = {"name": event.name, "arguments": ""}
            call = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
            self._calls.append(call)
            return AnswerMessage(tool_calls=[{"index": event.number, **call, "function": dict(function)}])
        assert isinstance(event, Arguments), "an event is one of three"
        self._calls[event.number]["function"]["arguments"] += event.text
        return AnswerMessage(tool_calls=[{"index": event.number, "function": {"arguments": event.text}}])


def tool_reader(body: ChatRequest) -> ToolReader | None:
    """None for a request whose answer calls no tools."""
    if not body.tools or body.tool_choice == "none":
        return None
    named = isinstance(body.tool_choice, NamedTool)
    return ToolReader(several=body.parallel_tool_calls is not False, named=named)


def chosen_form(body: ChatRequest) -> StructuredOutputsParams | None:
    """The form of the answer: of the calls that `tool_choice` asks for, else the one that the request has.

    Raises InvalidRequest.
    """
    form, choice = body.form(), body.tool_choice
    if choice in (None, "none", "auto"):
        return form
    if form is not None:
        raise InvalidRequest("tool_choice asks for a call, and another field for another form: give one", "tool_choice")
    name = choice.function.get("name", "") if isinstance(choice, NamedTool) else None
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    return forced_calls(tools, name, several=body.parallel_tool_calls is not False)
