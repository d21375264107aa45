"""Ends a stream when its client leaves, at any moment, or does not read.

Ray Serve 2.60's proxy passes a client's cancel on only when it reaches the proxy while that waits for the replica's
next message. One that comes while a message is being written is lost (8 of 66 streams that clients left after one or
two tokens), and the replica generates to the end for nobody. `relay_cancels` closes that gap.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import grpc

from cluster.serving.grpc.context import HintedDetails, retry_hint

UNREAD_TIMEOUT_S = 120.0


class ContextShield:
    """A gRPC context that can be taken from a handler that outlives its call: to use it then kills the process."""

    def __init__(self, context: Any) -> None:
        self._context = context

    def detach(self) -> None:
        """From now on every method does nothing and returns None."""
        self._context = None

    def set_details(self, details: str) -> None:
        """Also sets the retry hint that came with a stream's details: Serve's proxy passes on no trailing metadata."""
        if self._context is None:
            return
        self._context.set_details(str(details))  # gRPC takes no subclass
        if isinstance(details, HintedDetails):
            before = tuple(self._context.trailing_metadata() or ())
            self._context.set_trailing_metadata((*before, retry_hint(details.retry_after_s)))

    def __getattr__(self, name: str) -> Any:
        if self._context is None:
            return lambda *args, **kwargs: None
        return getattr(self._context, name)


def relay_cancels(
    handler: Callable[[Any, Any], AsyncGenerator[bytes, None]], unread_timeout_s: float = UNREAD_TIMEOUT_S
) -> Callable[..., Any]:
    """A streaming handler that ends when its client leaves, at any moment, in the one way that Serve passes on: by a
    cancel while it waits for the next message.

    unread_timeout_s: a client that takes no message for so long counts as gone; it sees the end when it reads again.
    """

    async def stream(request: Any, context: Any) -> None:
        shield = ContextShield(context)
        messages = handler(request, shield)
        begun = ended = False
        try:
            async for message in messages:
                if not begun:  # else the status would carry it again, which fails
                    await context.send_initial_metadata(())
                    begun = True
                async with asyncio.timeout(unread_timeout_s):
                    await context.write(message)
            ended = True
        except TimeoutError:
            context.set_code(grpc.StatusCode.RESOURCE_EXHAUSTED)
            context.set_details(f"the client has read nothing for {unread_timeout_s:g} s, and the stream was ended")
        finally:
            if not ended:
                shield.detach()
                waiting = asyncio.ensure_future(anext(messages))
                await asyncio.sleep(0)  # lets it begin to wait
                waiting.cancel()
                await asyncio.wait([waiting])
                if not waiting.cancelled():
                    waiting.exception()  # taken note of: the client is gone
                    await messages.aclose()  # it had a message at once, and did not wait

    return stream
