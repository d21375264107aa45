"""A process that tokenizes, renders and detokenizes large inputs, so that its parent's interpreter lock stays free.

    python -m cluster.serving.text.worker MODEL_DIR

It reads tasks from standard input and writes their outcomes to standard output, one after the other, each as a length
and a pickle; only its parent can reach these. When its parent ends, in whatever way, its input ends and so does it.
"""

import os
import pickle
import struct
import sys
from array import array
from collections.abc import Sequence
from typing import IO, Any

from cluster.errors import ClusterError
from cluster.serving.text.tokenizer import Tokenizer
from cluster.types import ChatMessage

LENGTH = struct.Struct("<Q")
NICENESS = 5  # the ingress, which answers many requests at once, goes before one large input

Task = tuple[str, Any]


def do(tokenizer: Tokenizer, task: Task) -> "array[int] | str":
    """Returns a task's outcome: token ids, or a text. Raises InvalidRequest."""
    kind, value = task
    match kind:
        case "text":
            return array("q", tokenizer.encode(value))
        case "chat":
            return array("q", tokenizer.encode_chat([ChatMessage(role=role, content=text) for role, text in value]))
        case "ids":
            token_ids, skip_special_tokens = value
            return tokenizer.decode(token_ids.tolist(), skip_special_tokens)
    raise ValueError(f"unknown task {kind!r}")


def chat_task(messages: Sequence[ChatMessage]) -> Task:
    return "chat", [(message.role, message.content) for message in messages]


def write_frame(stream: IO[bytes], value: object) -> None:
    data = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(LENGTH.pack(len(data)))
    stream.write(data)
    stream.flush()


def main() -> None:
    outcomes = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a stray print goes to stderr, not between the outcomes
    os.nice(NICENESS)
    tokenizer = Tokenizer(sys.argv[1])
    tasks = sys.stdin.buffer
    while len(head := tasks.read(LENGTH.size)) == LENGTH.size:
        data = tasks.read(LENGTH.unpack(head)[0])
        try:
            outcome: object = do(tokenizer, pickle.loads(data))
        except ClusterError as error:
            outcome = error
        write_frame(outcomes, outcome)


if __name__ == "__main__":
    main()
