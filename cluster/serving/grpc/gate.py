"""Before a call's message is read: may its caller call at all? Handlers for a grpc.aio server around others.

To gRPC a message of one call is read, up to its limit, before a handler for one message begins. These are handlers
for many messages, which on the wire is the same: they look at the caller first and then read one.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

from cluster.errors import ClusterError, DeadlineExceeded, InvalidRequest
from cluster.serving.grpc.handlers import GrpcContext, set_status

MESSAGE_TIMEOUT_S = 60.0  # for the message to come, once the call has begun


class Doorkeeper(Protocol):
    def lets_in(self, context: GrpcContext) -> bool:
        """Whether a call's message may be read; sets the call's status where not."""


Keeper = Callable[[], Doorkeeper | None]  # None where there is none in this process


def gated_unary(handler: Callable[[Any, Any], Awaitable[bytes]], keeper: Keeper) -> Callable[..., Awaitable[bytes]]:
    """A handler of many messages and one answer, around one of one message."""

    async def call(requests: AsyncIterator[bytes], context: Any) -> bytes:
        request = await _request(requests, context, keeper)
        return b"" if request is None else await handler(request, context)

    return call


def gated_stream(handler: Callable[[Any, Any], Awaitable[None]], keeper: Keeper) -> Callable[..., Awaitable[None]]:
    """The same for many answers, which the handler writes itself."""

    async def call(requests: AsyncIterator[bytes], context: Any) -> None:
        request = await _request(requests, context, keeper)
        if request is not None:
            await handler(request, context)

    return call


async def _request(requests: AsyncIterator[bytes], context: Any, keeper: Keeper) -> bytes | None:
    """The call's message; None where there is none to answer, with the status set."""
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
    set_status(context, error, "")
    return None
