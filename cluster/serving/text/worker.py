"""A process that tokenizes and detokenizes large inputs, or renders conversations, so that neither its parent's
interpreter lock nor its parent's memory is theirs.

    python -m cluster.serving.text.worker MODEL_DIR [tokenize | render] [SECONDS]

It reads tasks from standard input and writes their outcomes to standard output, one after the other, each as a length
and a pickle; only its parent can reach these. A mode makes it say first, in the same way, that it is ready. SECONDS of
the processor end the rendering of a conversation. When its parent ends, in whatever way, its input ends and so does it.
`process` is the parent's end.
"""

import os
import pickle
import resource
import signal
import struct
import sys
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from cluster.conversation import ChatMessage, Conversation
from cluster.errors import ClusterError, InvalidRequest
from cluster.serving.text.rendering import ChatRenderer
from cluster.serving.text.tokenizer import Tokenizer

LENGTH = struct.Struct("<Q")
NICENESS = 5  # the ingress, which answers many requests at once, goes before one large input
TOKENIZE, RENDER = "tokenize", "render"
MAX_RENDER_BYTES = 1 << 29  # of a process that renders: a template may multiply its input

Task = tuple[str, Any]


def do(tokenizer: Tokenizer, task: Task) -> "array[int] | str":
    """Returns a task's outcome: token ids, or a text. Raises InvalidRequest."""
    kind, value = task
    match kind:
        case "text":
            return array("q", tokenizer.encode(value))
        case "rendered":
            return array("q", tokenizer.encode_rendered(value))
        case "chat":  # of an ingress of version 0.1, which runs on while a newer package is installed
            turns = [ChatMessage(role=role, content=text) for role, text in value]
            return array("q", tokenizer.encode_chat(Conversation(messages=turns)))
        case "ids":
            token_ids, skip_special_tokens = value
            return tokenizer.decode(token_ids.tolist(), skip_special_tokens)
    raise ValueError(f"unknown task {kind!r}")


class _OutOfTime(BaseException):
    """Comes out of any template: they raise Exceptions, and jinja2 catches those."""


def render(renderer: ChatRenderer, task: Task, max_cpu_s: float) -> str:
    """Returns a conversation's text. For a process that does nothing else. Raises InvalidRequest."""
    _, chat = task
    signal.signal(signal.SIGVTALRM, _end)
    signal.setitimer(signal.ITIMER_VIRTUAL, max_cpu_s)
    try:
        return renderer.render(chat)
    except MemoryError:
        limit = f"{MAX_RENDER_BYTES >> 20} MiB"
    except _OutOfTime:
        limit = f"{max_cpu_s:g} s of the processor"
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    raise InvalidRequest(f"chat takes more than {limit} to render with the model's chat template", "chat")


def _end(number: int, frame: object) -> None:
    raise _OutOfTime


def write_frame(stream: IO[bytes], value: object) -> None:
    data = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(LENGTH.pack(len(data)))
    stream.write(data)
    stream.flush()


def main() -> None:
    model_dir, mode = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else ""
    outcomes = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a stray print goes to stderr, not between the outcomes
    perform: Callable[[Task], object]
    if mode == RENDER:
        resource.setrlimit(resource.RLIMIT_DATA, (MAX_RENDER_BYTES, MAX_RENDER_BYTES))
        renderer, max_cpu_s = ChatRenderer(model_dir), float(sys.argv[3])
        perform = lambda task: render(renderer, task, max_cpu_s)  # noqa: E731
    else:
        os.nice(NICENESS)
        tokenizer = Tokenizer(model_dir)
        perform = lambda task: do(tokenizer, task)  # noqa: E731
    if mode:
        write_frame(outcomes, mode)
    _work(sys.stdin.buffer, outcomes, perform)


def _work(tasks: IO[bytes], outcomes: IO[bytes], perform: Callable[[Task], object]) -> None:
    while len(head := tasks.read(LENGTH.size)) == LENGTH.size:
        data = tasks.read(LENGTH.unpack(head)[0])
        try:
            outcome = perform(pickle.loads(data))
        except ClusterError as error:
            outcome = error
        write_frame(outcomes, outcome)


if __name__ == "__main__":
    main()
