"""Calls that stay open to watch the cluster: bounded by client and in all. They take no place of a request."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.errors import Overloaded

RETRY_S = 10.0


class Watchers:
    """For one event loop. most: at a time, of which one client has a quarter at most, or 4."""

    def __init__(self, most: int) -> None:
        self._most, self._most_of_one = most, min(most, max(4, most // 4))
        self._open: Counter[str] = Counter()

    @contextmanager
    def open(self, client: str) -> Iterator[None]:
        """Counts a watcher while it is open. Raises Overloaded."""
        if self._open.total() >= self._most:
            raise Overloaded.later(f"{self._most} watch the cluster here, as many as may", RETRY_S)
        if self._open[client] >= self._most_of_one:
            raise Overloaded.later(f"{self._most_of_one} of this client watch the cluster, as many as may", RETRY_S)
        self._open[client] += 1
        try:
            yield
        finally:
            self._open[client] -= 1
            if not self._open[client]:
                del self._open[client]
