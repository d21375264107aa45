"""Calls that need no key, health and reflection, and those without the one that they need: bounded by themselves.

They take no place of a request, and one host leaves room for the others. A short question (Check) is not counted: its
refusal would cost as much as its answer, and a probe may come from the same address as a flood.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cluster.errors import Overloaded
from cluster.serving.admission.api_keys import TokenBucket

RETRY_S = 10.0
MAX_HOSTS = 4096  # whose calls are remembered; the one that has not called for longest is forgotten first


@dataclass(frozen=True, slots=True, kw_only=True)
class StrangerLimits:
    """max_calls: that stay (Watch, reflection), at a time.  max_calls_per_host: of them.
    calls_per_minute: of one host that stay, or were refused for want of a key."""

    max_calls: int = 256
    max_calls_per_host: int = 32
    calls_per_minute: int = 600


class Strangers:
    """For one event loop. clock: monotonic seconds."""

    def __init__(self, limits: StrangerLimits, clock: Callable[[], float]) -> None:
        self._limits, self._clock = limits, clock
        self._staying: Counter[str] = Counter()
        self._rates: OrderedDict[str, TokenBucket] = OrderedDict()

    def called(self, host: str) -> None:
        """Counts one call of a host. Raises Overloaded."""
        now, per_minute = self._clock(), self._limits.calls_per_minute
        rate = self._rates.setdefault(host, TokenBucket(per_minute, now))
        self._rates.move_to_end(host)
        if len(self._rates) > MAX_HOSTS:
            self._rates.popitem(last=False)
        if wait_s := rate.wait_s(now):
            raise _too_many(f"{per_minute} calls without a key a minute", max(0.1, wait_s))
        rate.take(1)

    @contextmanager
    def staying(self, host: str) -> Iterator[None]:
        """Counts a call while it is open. Raises Overloaded."""
        self.called(host)
        limits = self._limits
        if self._staying[host] >= limits.max_calls_per_host:
            raise _too_many(f"{limits.max_calls_per_host} calls without a key at a time from one host", RETRY_S)
        if self._staying.total() >= limits.max_calls:
            raise _too_many(f"{limits.max_calls} calls without a key at a time", RETRY_S)
        self._staying[host] += 1
        try:
            yield
        finally:
            self._staying[host] -= 1
            if not self._staying[host]:
                del self._staying[host]


def _too_many(limit: str, later_s: float) -> Overloaded:
    return Overloaded(f"this server takes at most {limit}: try again in {later_s:.1f} s", later_s)
