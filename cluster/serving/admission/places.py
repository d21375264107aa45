"""How many generations run, for which clients, and whether one more may begin. Knows no keys and no prompts."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isinf

from cluster.engine.retry_hint import RetryHint
from cluster.errors import Overloaded, Unavailable

log = logging.getLogger(__name__)

UNKNOWN_HALF = 64  # where the room is not known: the sequences that one engine computes at a time by default


class Places:
    """Counts the generations under way. For one event loop.

    max_per_client: at a time; 0: any number.
    room: returns how many the backend has place for.  clock: monotonic seconds.
    """

    def __init__(self, max_per_client: int, room: Callable[[], float], clock: Callable[[], float]) -> None:
        self._max_per_client, self._room, self._clock = max_per_client, room, clock
        self._by_client: Counter[str] = Counter()
        self._retry_hint = RetryHint(clock())
        self.draining = False

    @property
    def num_running(self) -> int:
        """Generations that have begun and have not ended."""
        return self._by_client.total()

    def drain(self) -> None:
        """Refuses new generations from now on; running and accepted ones go on."""
        if not self.draining:
            log.info("draining: %d requests are running", self.num_running)
        self.draining = True

    def of_a_call(self) -> int:
        """How many generations one call may have at a time: half of all, so that one call of many prompts leaves room
        for others, and as many as its client may."""
        room = self._room()
        half = UNKNOWN_HALF if isinf(room) else max(1, int(room / 2))
        return min(half, self._max_per_client or half)

    @contextmanager
    def taken(self, client: str, *, accepted: bool = False, goes_on: bool = False) -> Iterator[None]:
        """Takes a place while it is open. Raises Unavailable, Overloaded.

        accepted: its client has been told that it will be answered, so draining does not refuse it.
        goes_on: it comes after another one of the same call, whose place it takes: nothing refuses it.
        """
        if self.draining and not (accepted or goes_on):
            raise Unavailable("this server is shutting down, send the request to another one")
        if not goes_on:
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
        limit = self._max_per_client
        if limit and self._by_client[client] >= limit:
            reason = f"this client has {limit} requests running, as many as it may"
            raise Overloaded.later(reason, self._retry_hint.seconds(limit))
        if self.num_running >= self._room() and not self._is_modest(client):
            retry_after_s = self._retry_hint.seconds(self.num_running)
            raise Overloaded.later("all attention replicas are full", retry_after_s)

    def _is_modest(self, client: str) -> bool:
        """Returns whether another client has two more running: then a full server lets this one ask, and an engine
        chooses between them."""
        return self._by_client[client] + 2 <= max(self._by_client.values(), default=0)
