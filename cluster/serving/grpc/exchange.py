"""A handler of a stream of requests on a grpc.aio server: each is answered by itself, as soon as it can be."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from cluster.serving.grpc.gate import Keeper

log = logging.getLogger(__name__)

AT_A_TIME = 128  # requests of one stream that are answered; further ones are not read meanwhile
IDLE_TIMEOUT_S = 600.0  # a stream without a request under way ends after it


class SharedContext:
    """A call's context for several handlers at once. Not thread-safe.

    Their messages go out one at a time, metadata once, and the first failure is the call's.
    """

    def __init__(self, context: Any) -> None:
        self._context = context
        self._writing = asyncio.Lock()
        self._begun = self._failed = False

    async def send_initial_metadata(self, metadata: Any) -> None:
        async with self._writing:
            if not self._begun:
                self._begun = True
                await self._context.send_initial_metadata(metadata)

    async def write(self, message: bytes) -> None:
        async with self._writing:
            await self._context.write(message)

    def set_code(self, code: Any) -> None:
        if not self._failed:
            self._context.set_code(code)

    def set_details(self, details: str) -> None:
        if not self._failed:
            self._context.set_details(details)
        self._failed = self._failed or self._context.code() not in (None, 0, grpc.StatusCode.OK)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


def gated_exchange(handler: Callable[[Any, Any], Awaitable[None]], keeper: Keeper) -> Callable[..., Awaitable[None]]:
    """Returns a handler of many requests around one that answers one of them: it writes to the context that it gets."""

    async def call(requests: AsyncIterator[bytes], context: Any) -> None:
        doorkeeper = keeper()
        if doorkeeper is None or doorkeeper.lets_in(context):
            await _Exchange(handler, SharedContext(context)).run(requests)

    return call


class _Exchange:
    """One stream of requests."""

    def __init__(self, handler: Callable[[Any, Any], Awaitable[None]], context: SharedContext) -> None:
        self._handler, self._context = handler, context
        self._places = asyncio.Semaphore(AT_A_TIME)
        self._num_under_way = 0

    async def run(self, requests: AsyncIterator[bytes]) -> None:
        """Cancelling it cancels what is under way."""
        async with asyncio.TaskGroup() as group:
            while (request := await self._next(requests)) is not None:
                await self._places.acquire()
                self._num_under_way += 1
                group.create_task(self._answer(request))

    async def _next(self, requests: AsyncIterator[bytes]) -> bytes | None:
        """The stream's next request; None at its end, and after a long time without any."""
        coming = asyncio.ensure_future(_take(requests))
        try:
            while not (await asyncio.wait({coming}, timeout=IDLE_TIMEOUT_S))[0]:
                if not self._num_under_way:
                    self._context.set_code(grpc.StatusCode.DEADLINE_EXCEEDED)
                    self._context.set_details(f"no request came for {IDLE_TIMEOUT_S:g} s: begin another stream")
                    return None
            return coming.result()
        finally:
            coming.cancel()

    async def _answer(self, request: bytes) -> None:
        try:
            await self._handler(request, self._context)
        except Exception:  # the other requests of the stream go on
            log.exception("a request of a stream failed")
            self._context.set_code(grpc.StatusCode.INTERNAL)
            self._context.set_details("internal error; see the server's log")
        finally:
            self._num_under_way -= 1
            self._places.release()


async def _take(requests: AsyncIterator[bytes]) -> bytes | None:
    return await anext(requests, None)
