"""Prints an answer while it grows. Does not know how a model writes its tool calls: a reader takes them out."""

import json
import sys
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Protocol

from cluster.conversation import ToolCall
from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.working import awaited

_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class ToolCallReader(Protocol):
    """Takes the calls out of one answer. Text that may still become a call is held back."""

    def feed(self, text: str) -> Iterable[str | ToolCall]:
        """Returns texts and whole calls, in their order, as far as they are certain."""
        ...

    def end(self) -> Iterable[str | ToolCall]:
        """Returns the rest, once the answer has ended."""
        ...


class TextAlone:
    """Reads no calls: a call is the text that the model writes for it."""

    def feed(self, text: str) -> Iterable[str | ToolCall]:
        return (text,)

    def end(self) -> Iterable[str | ToolCall]:
        return ()


@dataclass(slots=True)
class Shown:
    """An answer as far as it has come. stopped: by Ctrl-C.  reason: a name of FinishReason."""

    texts: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    stopped: bool = False
    reason: str = ""
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    seconds: float = 0.0

    @property
    def text(self) -> str:
        return "".join(self.texts)


def show(
    pieces: Generator[pb.GenerateStreamResponse, None, None],
    reader: ToolCallReader,
    draw_call: Callable[[ToolCall], None],
) -> Shown:
    """Prints an answer; Ctrl-C ends it. Raises ClusterError."""
    shown = Shown()
    begun_s = time.monotonic()
    terminal = sys.stdout.isatty()

    def take(parts: Iterable[str | ToolCall]) -> None:
        for part in parts:
            if isinstance(part, ToolCall):
                shown.calls.append(part)
                draw_call(part)
            else:
                shown.texts.append(part)
                # A model may write any character, also those that steer a terminal.
                print(part.translate(_CONTROLS) if terminal else part, end="", flush=True)

    try:
        with closing(pieces):
            for piece in awaited(pieces, "waiting for the first token …"):
                shown.num_tokens += len(piece.token_ids)
                take(reader.feed(piece.text))
                if piece.finish_reason:
                    shown.reason = pb.FinishReason.Name(piece.finish_reason)
                    shown.num_prompt_tokens = piece.usage.prompt_tokens
            take(reader.end())
    except KeyboardInterrupt:
        shown.stopped = True
    shown.seconds = time.monotonic() - begun_s
    print(flush=True)
    return shown


def call_line(call: ToolCall) -> str:
    """A call as a line: get_weather(city="Paris")."""
    arguments = ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in call.arguments.items())
    return f"{call.name}({arguments})"


def account(shown: Shown, context: int) -> str:
    """The line below an answer. context: the most tokens that prompt and answer may have."""
    rate = f", {shown.num_tokens / shown.seconds:.1f} a second" if shown.seconds > 0 else ""
    parts = [f"{shown.num_tokens:,} tokens in {shown.seconds:.1f} s{rate}"]
    if shown.stopped:
        parts.append("stopped")
    else:
        parts.append(f"{shown.num_prompt_tokens + shown.num_tokens:,} of {context:,} tokens of context")
        if shown.reason == "FINISH_REASON_LENGTH":
            parts.append("cut off: max_tokens or the context is used up")
    return "; ".join(parts)
