"""Reads calls of tools out of a model's text while it comes, in the format of Hermes, which Qwen's models write:

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

Any number of calls, and text before and between them. The events do not depend on how the text is cut into pieces:
joined, they are those of the whole text at once. A call's arguments come as they are written once its name has, if it
has the name first, as above; else when it is complete. A call that is none (no JSON, no name) is text.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

BEGIN, END = "<tool_call>", "</tool_call>"
_NAME_FIRST = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\<\x00-\x1f]|\\.)+")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_CLOSING = re.compile(r"\s*\}?\s*")
MAX_HEAD_CHARS = 1024  # up to the arguments: a longer head is read when its call is complete


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the answer's content."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    """A call of a function; calls are numbered from 0."""

    number: int
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """A piece of a call's arguments: JSON, as the model wrote it."""

    number: int
    text: str


Event = Text | CallBegins | Arguments


class HermesReader:
    """One answer's. Not thread-safe.

    White space around calls is no content; at an answer without calls it is.
    """

    def __init__(self) -> None:
        self.num_calls = 0
        self._rest = ""  # not read yet
        self._space = ""  # behind the content so far
        self._after_call = False
        self._state = self._content
        self._depth = 0
        self._in_string = self._escaped = False

    def push(self, text: str) -> list[Event]:
        """Takes a piece of the answer; returns what is certain now."""
        self._rest += text
        return self._read(last=False)

    def end(self) -> list[Event]:
        """Returns what was held back at the answer's end. A call without its end counts if it is complete JSON."""
        events = self._read(last=True)
        if self._space and not self.num_calls:
            events.append(Text(self._space))
        self._space = ""
        return events

    def _read(self, *, last: bool) -> list[Event]:
        events: list[Event] = []
        while self._state(events, last):
            pass
        return events

    def _content(self, events: list[Event], last: bool) -> bool:
        """Text outside of calls. Returns whether there is more to read, as the other states do."""
        place = self._rest.find(BEGIN)
        if place < 0:
            kept = 0 if last else _num_open(self._rest, BEGIN)
            self._add_text(events, self._rest[: len(self._rest) - kept])
            self._rest = self._rest[len(self._rest) - kept :]
            return False
        self._add_text(events, self._rest[:place])
        self._rest = self._rest[place + len(BEGIN) :]
        self._state = self._head
        return True

    def _head(self, events: list[Event], last: bool) -> bool:
        """A call up to its arguments."""
        match = _NAME_FIRST.match(self._rest[:MAX_HEAD_CHARS])
        if match is not None:
            name = _parsed(match[1])
            if isinstance(name, str):
                self._begin(events, name)
                self._rest = self._rest[match.end() :]
                self._depth, self._in_string, self._escaped = 0, False, False
                self._state = self._arguments
                return True
        if END in self._rest or last:
            self._state = self._whole_call
            return True
        return False

    def _whole_call(self, events: list[Event], last: bool) -> bool:
        """A call that is complete, or the last thing in the answer."""
        place = self._rest.find(END)
        text = self._rest if place < 0 else self._rest[:place]
        name, arguments = _call(text)
        if name:
            self._begin(events, name)
            events.append(Arguments(self.num_calls - 1, arguments))
        else:
            self._add_text(events, BEGIN + (text if place < 0 else text + END))
        self._rest = "" if place < 0 else self._rest[place + len(END) :]
        self._state = self._content
        return bool(self._rest)

    def _arguments(self, events: list[Event], last: bool) -> bool:
        """An object, up to the brace that closes it."""
        for place, char in enumerate(self._rest):
            self._step(char)
            if not self._depth:
                self._add_arguments(events, self._rest[: place + 1])
                self._rest = self._rest[place + 1 :]
                self._state = self._tail
                return True
        self._add_arguments(events, self._rest)
        self._rest = ""
        return False

    def _step(self, char: str) -> None:
        if self._in_string:
            self._in_string = char != '"' or self._escaped
            self._escaped = char == "\\" and not self._escaped
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1

    def _tail(self, events: list[Event], last: bool) -> bool:
        """Behind a call's arguments, up to its end. Anything else that stands there is content."""
        closing = _CLOSING.match(self._rest)
        after = self._rest[closing.end() if closing else 0 :]
        if not last and END.startswith(after):
            return False
        self._rest = after.removeprefix(END)
        self._state = self._content
        return True

    def _begin(self, events: list[Event], name: str) -> None:
        self._space, self._after_call = "", True
        events.append(CallBegins(self.num_calls, name))
        self.num_calls += 1

    def _add_arguments(self, events: list[Event], text: str) -> None:
        if text:
            events.append(Arguments(self.num_calls - 1, text))

    def _add_text(self, events: list[Event], text: str) -> None:
        """Holds white space back until text comes behind it."""
        whole = self._space + text
        if self._after_call:
            whole = whole.lstrip()
        shown = whole.rstrip()
        if shown:
            events.append(Text(shown))
            self._after_call = False
        self._space = whole[len(shown) :]


def _num_open(text: str, tag: str) -> int:
    """The length of the longest end of a text that a tag begins with."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-n:])), 0)


def _call(text: str) -> tuple[str, str]:
    """The name and the arguments of a call as JSON; "" for what is no call."""
    value = _parsed(text)
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return "", ""
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # some models write the object as a text
        arguments = _parsed(arguments) if isinstance(_parsed(arguments), dict) else None
    if not isinstance(arguments, dict):
        return "", ""
    return value["name"], json.dumps(arguments, ensure_ascii=False)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
