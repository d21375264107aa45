"""Calls that need no key (health, reflection) and calls without the key that they need: bounded by themselves.

They take no place of a request, and one host leaves room for the others.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cluster.config import DEFAULTS
from cluster.errors import Overloaded
from cluster.serving.admission.token_bucket import TokenBucket

RETRY_S = 10.0
MIN_RETRY_S = 0.1
MAX_HOSTS = 4096  # remembered; the host that has not called for longest is forgotten first


@dataclass(frozen=True, slots=True, kw_only=True)
class KeylessLimits:
    """max_calls: open at a time (Watch, reflection).  max_calls_per_host: of these, from one host.
    calls_per_minute: new ones of these from one host, its messages of reflection, and its calls refused for want of a
    key.
    """

    max_calls: int = DEFAULTS["max_keyless_calls"]
    max_calls_per_host: int = DEFAULTS["max_keyless_calls_per_host"]
    calls_per_minute: int = DEFAULTS["keyless_calls_per_minute"]


class KeylessCalls:
    """For one event loop. clock: monotonic seconds."""

    def __init__(self, limits: KeylessLimits, clock: Callable[[], float]) -> None:
        self._limits, self._clock = limits, clock
        self._open: Counter[str] = Counter()
        self._rates: OrderedDict[str, TokenBucket] = OrderedDict()

    def count(self, host: str, calls: int = 1) -> None:
        """Counts calls of a host; the last may be more than its minute has left. Raises Overloaded."""
        now, per_minute = self._clock(), self._limits.calls_per_minute
        rate = self._rates.setdefault(host, TokenBucket(per_minute, now))
        self._rates.move_to_end(host)
        if len(self._rates) > MAX_HOSTS:
            self._rates.popitem(last=False)
        if wait_s := rate.wait_s(now):
            raise _too_many(f"{per_minute} calls without a key a minute", wait_s)
        rate.take(calls)

    @contextmanager
    def open(self, host: str) -> Iterator[None]:
        """Counts a call while it is open. Raises Overloaded."""
        self.count(host)
        limits = self._limits
        if self._open[host] >= limits.max_calls_per_host:
            raise _too_many(f"{limits.max_calls_per_host} calls without a key at a time from one host", RETRY_S)
        if self._open.total() >= limits.max_calls:
            raise _too_many(f"{limits.max_calls} calls without a key at a time", RETRY_S)
        self._open[host] += 1
        try:
            yield
        finally:
            self._open[host] -= 1
            if not self._open[host]:
                del self._open[host]


def _too_many(limit: str, retry_after_s: float) -> Overloaded:
    return Overloaded.later(f"this server takes at most {limit}", max(MIN_RETRY_S, retry_after_s))
