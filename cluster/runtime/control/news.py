"""Lets tasks of one event loop wait until something has become true."""

import asyncio
from collections.abc import Callable


class News:
    """`tell` wakes all waiting tasks; each looks whether its own condition is true now."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[None]] = set()

    def tell(self) -> None:
        """Something has changed."""
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        """Returns once the condition is true, at once where it is."""
        while not condition():
            waiting = asyncio.get_running_loop().create_future()
            self._waiting.add(waiting)
            try:
                await waiting
            finally:
                self._waiting.discard(waiting)
