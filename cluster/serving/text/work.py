"""Tokenizes, renders and detokenizes beside the event loop: a long input delays neither the loop nor short inputs.

Small inputs take less time than a thread would cost. Medium ones go to a thread, where tokenizing releases the
interpreter lock. Large ones go to a process (`worker`), since lists of a million tokens and pickles keep that lock.
Conversations are rendered in processes of their own, whatever their size: a chat template is a program of the
checkpoint's, which may loop or take gigabytes, and then only that process ends. Each thread and process takes one input
after the other, and a bounded number wait.
"""

from array import array
from collections.abc import Sequence
from typing import Any

from cluster.conversation import Conversation
from cluster.errors import InvalidRequest
from cluster.grammar.source import check
from cluster.serving.text.lane import Lane
from cluster.serving.text.process import RENDERING, TextProcess
from cluster.serving.text.tokenizer import Tokenizer
from cluster.serving.text.worker import Task, do
from cluster.structured import FIELD, Constraint

MEDIUM_CHARS, LARGE_CHARS = 2048, 32_768  # about 0.5 and 8 ms of tokenizing


class TextWork:
    """For one checkpoint and one event loop. max_waiting: inputs of each kind."""

    def __init__(self, tokenizer: Tokenizer, max_waiting: int) -> None:
        self._tokenizer = tokenizer
        self._medium = Lane("inputs", max_waiting)
        self._large = Lane("large inputs", max_waiting)
        self._chats = Lane("chats", max_waiting)
        self._large_chats = Lane("large chats", max_waiting)
        self._grammars = Lane("grammars", max_waiting)
        self._process = TextProcess(tokenizer.model_dir)
        self._renderer = TextProcess(tokenizer.model_dir, RENDERING)
        self._large_renderer = TextProcess(tokenizer.model_dir, RENDERING)

    async def start(self) -> None:
        """Starts the process that renders most conversations, so that the first one finds it ready."""
        if self._tokenizer.has_chat_template:
            await self._chats.run(self._renderer.start)

    async def encode(self, text: str, client: str = "") -> list[int]:
        """Raises InvalidRequest, Overloaded, Unavailable."""
        return _ids(await self._do(("text", text), len(text), client))

    async def encode_chat(self, chat: Conversation, client: str = "") -> list[int]:
        """Raises as `encode`."""
        if not self._tokenizer.has_chat_template:
            self._tokenizer.render(chat)  # raises: no process is needed to say so
        small = not chat.is_long(LARGE_CHARS)
        lane, process = (self._chats, self._renderer) if small else (self._large_chats, self._large_renderer)
        text = str(await lane.run(lambda: process.do(("chat", chat)), client))
        return _ids(await self._do(("rendered", text), len(text), client))

    async def decode(self, token_ids: Sequence[int], skip_special_tokens: bool, client: str = "") -> str:
        """Raises as `encode`."""
        return str(await self._do(("ids", (array("q", token_ids), skip_special_tokens)), len(token_ids), client))

    def check_stop(self) -> None:
        """Raises nothing: stop strings are found in the text."""

    async def check_constraint(self, constraint: Constraint, client: str = "") -> None:
        """Raises InvalidRequest for what is no grammar, Overloaded."""
        await self._grammars.run(lambda: check(constraint), client)

    def end(self) -> None:
        """Ends the processes; a later input starts them again."""
        for process in (self._process, self._renderer, self._large_renderer):
            process.end()

    async def _do(self, task: Task, num_chars: int, client: str) -> "array[int] | str":
        if num_chars < MEDIUM_CHARS:
            return do(self._tokenizer, task)
        if num_chars < LARGE_CHARS:
            return await self._medium.run(lambda: do(self._tokenizer, task), client)
        return await self._large.run(lambda: self._process.do(task), client)


class NoTextWork:
    """In place of TextWork where there is no tokenizer: refuses every text with InvalidRequest."""

    async def start(self) -> None:
        """Has nothing to start."""

    async def encode(self, text: str, client: str = "") -> list[int]:
        raise _no_tokenizer("text needs", "send token_ids", "text")

    async def encode_chat(self, chat: Conversation, client: str = "") -> list[int]:
        raise _no_tokenizer("chat needs", "send token_ids", "chat")

    async def decode(self, token_ids: Sequence[int], skip_special_tokens: bool, client: str = "") -> str:
        raise _no_tokenizer("the text of token_ids needs", "ask a server that has it", "token_ids")

    def check_stop(self) -> None:
        raise _no_tokenizer("stop needs", "send stop_token_ids", "stop")

    async def check_constraint(self, constraint: Constraint, client: str = "") -> None:
        raise _no_tokenizer(f"{FIELD} needs", "ask a server that has it", FIELD)


def _no_tokenizer(need: str, advice: str, field: str) -> InvalidRequest:
    return InvalidRequest(f"{need} the tokenizer, which this server has left out (skip_tokenizer): {advice}", field)


def _ids(outcome: Any) -> list[int]:
    return list(outcome.tolist())
