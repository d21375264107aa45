"""Tokenizes, renders and detokenizes beside the event loop: a long input delays neither the loop nor short inputs.

Small inputs take less time than a thread would cost. Medium ones go to a thread, where tokenizing releases the
interpreter lock. Large ones go to a process (`worker`), since templates, lists of a million tokens and pickles keep
that lock. Thread and process take one input after the other, and a bounded number wait.
"""

import logging
import os
import pickle
import select
import subprocess
import sys
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from cluster.errors import ClusterError, InvalidRequest, Unavailable
from cluster.serving.text.lane import Lane
from cluster.serving.text.tokenizer import Tokenizer
from cluster.serving.text.worker import LENGTH, Task, chat_task, do, write_frame
from cluster.types import ChatMessage

log = logging.getLogger(__name__)

MEDIUM_CHARS, LARGE_CHARS = 2048, 32_768  # about 0.5 and 8 ms of tokenizing
CHARS_A_MESSAGE = 64  # a template takes as long for a message's frame as for so many characters
MAX_TASK_S = 60.0  # a megabyte takes some seconds
READ_BYTES = 1 << 20


class TextWork:
    """For one checkpoint and one event loop. max_waiting: medium and large inputs, each."""

    def __init__(self, tokenizer: Tokenizer, max_waiting: int) -> None:
        self._tokenizer = tokenizer
        self._medium = Lane("inputs", max_waiting)
        self._large = Lane("large inputs", max_waiting)
        self._process = TextProcess(tokenizer.model_dir)

    async def encode(self, text: str, client: str = "") -> list[int]:
        """Raises InvalidRequest, Overloaded, Unavailable."""
        return _ids(await self._do(("text", text), len(text), client))

    async def encode_chat(self, messages: Sequence[ChatMessage], client: str = "") -> list[int]:
        """Raises as `encode`."""
        num_chars = sum(len(message.content) for message in messages) + CHARS_A_MESSAGE * len(messages)
        return _ids(await self._do(chat_task(messages), num_chars, client))

    async def decode(self, token_ids: Sequence[int], skip_special_tokens: bool, client: str = "") -> str:
        """Raises as `encode`."""
        return str(await self._do(("ids", (array("q", token_ids), skip_special_tokens)), len(token_ids), client))

    async def _do(self, task: Task, num_chars: int, client: str) -> "array[int] | str":
        if num_chars < MEDIUM_CHARS:
            return do(self._tokenizer, task)
        if num_chars < LARGE_CHARS:
            return await self._medium.run(lambda: do(self._tokenizer, task), client)
        return await self._large.run(lambda: self._process.do(task), client)


class TextProcess:
    """Starts the process of `worker` when it is first needed, and again when it is gone. For one thread."""

    def __init__(self, model_dir: Path, max_task_s: float = MAX_TASK_S) -> None:
        self._model_dir, self._max_task_s = model_dir, max_task_s
        self._process: subprocess.Popen[bytes] | None = None

    def do(self, task: Task) -> "array[int] | str":
        """Raises InvalidRequest, Unavailable. Blocks."""
        if self._process is None or self._process.poll() is not None:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            write_frame(process.stdin, task)
            outcome = _read_frame(process.stdout, time.monotonic() + self._max_task_s)
        except (EOFError, BrokenPipeError) as error:
            self._end()
            raise Unavailable("the process for large inputs ended while it had this one: send it again") from error
        except TimeoutError as error:
            self._end()
            raise InvalidRequest(
                f"the input takes longer than {self._max_task_s:g} s to tokenize: send a shorter one", "input"
            ) from error
        if isinstance(outcome, ClusterError):
            raise outcome
        assert isinstance(outcome, array | str)
        return outcome

    def _start(self) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [sys.executable, "-m", "cluster.serving.text.worker", str(self._model_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            log.warning("the process for large inputs is gone, with code %s", self._process.returncode)
        self._process = None


def _read_frame(stream: IO[bytes], deadline_s: float) -> object:
    """Raises EOFError, TimeoutError."""
    (length,) = LENGTH.unpack(_read(stream, LENGTH.size, deadline_s))
    return pickle.loads(_read(stream, length, deadline_s))


def _read(stream: IO[bytes], size: int, deadline_s: float) -> bytes:
    data = bytearray()
    while len(data) < size:
        if not select.select([stream], [], [], max(0.0, deadline_s - time.monotonic()))[0]:
            raise TimeoutError
        piece = os.read(stream.fileno(), min(READ_BYTES, size - len(data)))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


def _ids(outcome: Any) -> list[int]:
    return list(outcome.tolist())
