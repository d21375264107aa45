"""Asks Ray's GCS from an event loop, which goes on while the GCS is away, as when the head has died."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

import ray

P = ParamSpec("P")
T = TypeVar("T")
log = logging.getLogger(__name__)


class GcsThread:
    """One thread asks, so that no questions pile up: what a caller no longer waits for is not asked."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "gcs")

    async def ask(self, question: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """Raises what the question raises. Waits for a GCS that is away: Ray (2.60) lets some questions fail after a
        minute then, and others wait for ever."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                return await loop.run_in_executor(self._thread, partial(question, *arguments, **options))
            except ray.exceptions.GetTimeoutError as error:
                log.warning("Ray's GCS is away, it is asked again: %s", error)
