"""Reads a user's turns: from a terminal with an editor, a history and several lines; from anything else line by line.

A line that ends with a backslash goes on in the next one, and a text between two lines of three quotes may have any.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cluster.cli.terminal import utf8

if TYPE_CHECKING:  # prompt_toolkit loads for a terminal alone
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings

QUOTES = '"""'
PROMPT = "you> "


class Lines(Protocol):
    """Where turns come from."""

    def read(self) -> str:
        """Returns the next turn. Raises EOFError at the end, KeyboardInterrupt."""
        ...


def is_open(text: str) -> bool:
    """Whether another line belongs to it."""
    if text.lstrip().startswith(QUOTES):
        inner = text.strip()[len(QUOTES) :]
        return not inner.endswith(QUOTES)
    return text.endswith("\\")


def meant(text: str) -> str:
    """The turn that was typed, without its quotes and backslashes."""
    text = text.strip()
    if text.startswith(QUOTES):
        return text.removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")
    return text.removesuffix("\\").replace("\\\n", "\n").strip()


class PlainLines:
    """Of a pipe, a file or a terminal that cannot move its cursor."""

    def __init__(self, source: Iterator[str], ask: Callable[[str], None]) -> None:
        """ask: shows a prompt."""
        self._source, self._ask = source, ask

    def read(self) -> str:
        text = self._line(PROMPT)
        while is_open(text):
            try:
                text += "\n" + self._line("...> ")
            except EOFError:
                break
        return meant(text)

    def _line(self, prompt: str) -> str:
        self._ask(prompt)
        line = next(self._source, None)
        if line is None:
            raise EOFError
        return utf8(line.removesuffix("\n"), "the line")


class EditedLines:
    """Of a terminal, by prompt_toolkit: Enter sends, Alt-Enter begins a line, a pasted text stays whole."""

    def __init__(self, words: Mapping[str, str], history: Path | None) -> None:
        """words: those that Tab completes, with their meanings.  history: the file for turns; None keeps none."""
        from prompt_toolkit import PromptSession
        from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.formatted_text import FormattedText

        commands = WordCompleter(list(words), meta_dict=dict(words), sentence=True)
        self._session: PromptSession[str] = PromptSession(
            FormattedText([("bold", PROMPT)]),
            multiline=True,
            key_bindings=_keys(),
            history=_history(history),
            auto_suggest=AutoSuggestFromHistory(),
            completer=commands,
            complete_while_typing=False,
            prompt_continuation=lambda width, line, wrapped: "".rjust(width),
        )

    def read(self) -> str:
        return meant(utf8(self._session.prompt(), "the line"))


def open_lines(words: Mapping[str, str], history: Path | None) -> Lines:
    """The editor on a terminal that can move its cursor, else plain lines."""
    if is_terminal() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown", ""):
        return EditedLines(words, history)

    def ask(prompt: str) -> None:
        if sys.stdin.isatty() and sys.stderr.isatty():
            print(prompt, end="", file=sys.stderr, flush=True)

    return PlainLines(iter(sys.stdin.readline, ""), ask)


def is_terminal() -> bool:
    """Whether a person reads and types."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def history_file() -> Path:
    """Where the turns of earlier chats are, for this user alone."""
    base = os.environ.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser()
    return Path(base) / "moe-cluster" / "chat_history"


def _history(path: Path | None) -> "History":
    """Turns of earlier chats; in memory where the file cannot be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class Kept(FileHistory):
        def store_string(self, string: str) -> None:
            with suppress(OSError):  # a full disk ends no chat
                super().store_string(string)

    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except (OSError, RuntimeError):
        return InMemoryHistory()
    return Kept(str(path))


def _keys() -> "KeyBindings":
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-o")
    def begin_a_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys
