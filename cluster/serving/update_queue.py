"""Keeps a stream's updates for its reader: bounded, since a reader may be slow, or never read at all."""

import asyncio
from collections.abc import AsyncGenerator, Callable, MutableMapping
from dataclasses import replace

from cluster.errors import Overloaded
from cluster.types import SequenceUpdate

TOKEN_BYTES, LOGPROB_BYTES = 40, 120  # about the memory that Python takes for one


class UpdateQueue:
    """Gives all updates since the last `take` as one. For one event loop.

    max_bytes: of updates that nobody has taken. Beyond it the reader loses its stream: an error replaces the updates.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = self._num_tokens = 0
        self._updates: list[SequenceUpdate] = []
        self._news = asyncio.Event()
        self.overflowed = False

    def put(self, update: SequenceUpdate) -> bool:
        """Returns False once: for the update that finds no room. Later ones are dropped."""
        if self.overflowed:
            return True
        self._num_tokens += len(update.token_ids)
        self._num_bytes += size_of(update)
        self._news.set()
        if self._num_bytes > self._max_bytes and update.finish_reason != "error":
            self.overflowed = True
            reason = Overloaded(
                f"the client reads too slowly: {self._num_tokens} tokens that it had not taken were more than the "
                f"{self._max_bytes} bytes that are kept of a stream (max_unread_bytes): read faster, or ask for fewer "
                "logprobs"
            )
            update = SequenceUpdate(request_id=update.request_id, finish_reason="error", error=reason)
            self._updates.clear()
        self._updates.append(update)
        return not self.overflowed

    async def take(self) -> SequenceUpdate:
        await self._news.wait()
        self._news.clear()
        updates, self._updates = self._updates, []
        self._num_bytes = self._num_tokens = 0
        return merge_updates(updates)


async def follow(
    request_id: str,
    streams: MutableMapping[str, UpdateQueue],
    max_bytes: int,
    *,
    submit: Callable[[], object],
    cancel: Callable[[], object],
) -> AsyncGenerator[SequenceUpdate, None]:
    """Hands a request in, and yields its updates to the last one; closing it before that cancels the request.

    streams: has the request's queue meanwhile; who gets the engine's updates puts them there.
    """
    stream = streams[request_id] = UpdateQueue(max_bytes)
    ended = False
    try:
        submit()
        while not ended:
            update = await stream.take()
            ended = update.finish_reason is not None
            yield update
    finally:
        del streams[request_id]
        if not ended:
            cancel()


def size_of(update: SequenceUpdate) -> int:
    """Returns about how many bytes it takes in memory, without numbers: they come once, and never pile up."""
    num_logprobs = sum(1 + len(entry.top) for entry in update.logprobs)
    return TOKEN_BYTES * len(update.token_ids) + LOGPROB_BYTES * num_logprobs


def merge_updates(updates: list[SequenceUpdate]) -> SequenceUpdate:
    """Joins one sequence's updates, which are in order."""
    if len(updates) == 1:
        return updates[0]
    return replace(
        updates[-1],
        token_ids=tuple(token_id for update in updates for token_id in update.token_ids),
        logprobs=tuple(logprobs for update in updates for logprobs in update.logprobs),
        constrained=any(update.constrained for update in updates),
        adapter=next((update.adapter for update in updates if update.adapter), ""),  # an end may come without it
        cached_tokens=max(update.cached_tokens for update in updates),
    )
