"""Whether a request may begin: not while draining, within its client's share, while there is room. Knows no prompts."""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cluster.engine.retry_hint import RetryHint
from cluster.errors import Overloaded, Unavailable

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceLimits:
    """max_request_bytes: of one request on the wire.  max_streams_per_client: requests at a time; 0 for no bound.
    max_waiting_inputs: medium and large ones, each, that may wait to be tokenized.
    """

    max_request_bytes: int = 1 << 20
    max_streams_per_client: int = 0
    max_waiting_inputs: int = 64


class Admission:
    """Counts the requests under way. Not thread-safe: for one event loop.

    room: how many requests the backend has place for.  clock: monotonic seconds.
    """

    def __init__(
        self,
        limits: ServiceLimits,
        room: Callable[[], float] = lambda: math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._room = room
        self._clock = clock
        self._by_client: Counter[str] = Counter()
        self._retry_hint = RetryHint(clock())
        self.draining = False

    @property
    def num_running(self) -> int:
        """Requests that were let in and have not ended."""
        return self._by_client.total()

    def drain(self) -> None:
        """Refuses new requests from now on; running ones go on."""
        if not self.draining:
            log.info("draining: %d requests are running", self.num_running)
        self.draining = True

    @contextmanager
    def admitted(self, client: str) -> Iterator[None]:
        """Holds a place while it is open. Raises Unavailable, Overloaded."""
        self._check(client)
        self._by_client[client] += 1
        try:
            yield
        finally:
            self._by_client[client] -= 1
            if not self._by_client[client]:
                del self._by_client[client]
            self._retry_hint.ended(self._clock())

    def _check(self, client: str) -> None:
        if self.draining:
            raise Unavailable("this server is shutting down, send the request to another one")
        limit = self._limits.max_streams_per_client
        if limit and self._by_client[client] >= limit:
            later_s = self._retry_hint.seconds(limit)
            raise Overloaded(
                f"this client has {limit} requests running, as many as it may: try again in {later_s:.1f} s", later_s
            )
        if self.num_running >= self._room() and not self._is_modest(client):
            later_s = self._retry_hint.seconds(self.num_running)
            raise Overloaded(f"all attention replicas are full: try again in {later_s:.1f} s", later_s)

    def _is_modest(self, client: str) -> bool:
        """Whether a full server should hear this client: another one has two more running; an engine then chooses."""
        return self._by_client[client] + 2 <= max(self._by_client.values(), default=0)
