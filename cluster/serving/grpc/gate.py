"""Handlers for a grpc.aio server that look at the caller before they read a call's message, around others.

gRPC reads a call's message, up to its limit, before a handler for one message begins. These are handlers for many
messages, which is the same on the wire: they look at the caller first and then read one.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

from cluster.errors import ClusterError, DeadlineExceeded, InvalidRequest
from cluster.serving.grpc.context import GrpcContext, set_status

MESSAGE_TIMEOUT_S = 60.0  # for the message to come, once the call has begun


class Doorkeeper(Protocol):
    def lets_in(self, context: GrpcContext) -> bool:
        """Returns whether a call's message may be read; sets the call's status if not."""

    def count_refused(self, error: ClusterError) -> None:
        """Counts a call whose message did not come."""


Keeper = Callable[[], Doorkeeper | None]  # returns None in a process without one


def gated_unary(handler: Callable[[Any, Any], Awaitable[bytes]], keeper: Keeper) -> Callable[..., Awaitable[bytes]]:
    """Returns a handler of many messages and one answer, around a handler of one message."""

    async def call(requests: AsyncIterator[bytes], context: Any) -> bytes:
        request = await _request(requests, context, keeper)
        return b"" if request is None else await handler(request, context)

    return call


def gated_stream(handler: Callable[[Any, Any], Awaitable[None]], keeper: Keeper) -> Callable[..., Awaitable[None]]:
    """Returns the same for many answers, which the handler writes itself."""

    async def call(requests: AsyncIterator[bytes], context: Any) -> None:
        request = await _request(requests, context, keeper)
        if request is not None:
            await handler(request, context)

    return call


async def _request(requests: AsyncIterator[bytes], context: Any, keeper: Keeper) -> bytes | None:
    """Returns the call's message; None, with the status set, if there is nothing to answer."""
    doorkeeper = keeper()
    if doorkeeper is not None and not doorkeeper.lets_in(context):
        return None
    try:
        async with asyncio.timeout(MESSAGE_TIMEOUT_S):
            async for request in requests:
                return request
        error: ClusterError = InvalidRequest("the call ended before its message came", "request")
    except TimeoutError:
        error = DeadlineExceeded(f"the call's message did not come within {MESSAGE_TIMEOUT_S:g} s")
    if doorkeeper is not None:
        doorkeeper.count_refused(error)
    set_status(context, error)
    return None
