"""Shows whether a shard's work goes on: threads that compute report, any thread asks. Knows no shard and no carrier.

From outside, a long computation looks like one that hangs, but for the CPU time: a thread that computes on the CPU uses
some, a thread that waits for ever uses none.
"""

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from cluster.evolving import evolving


@evolving("cluster.experts.pulse")
@dataclass(frozen=True, slots=True, kw_only=True)
class Sign:
    """A sign of life. progress: changes while work goes on.  busy: whether there is work now.
    stuck_s: seconds since progress last changed, 0 without work."""

    progress: int = 0
    busy: bool = False
    stuck_s: float = 0.0


class Pulse:
    """All methods may be called from any thread. `begin` and `end` stand around each product: a microsecond each."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._counter = itertools.count(1)
        self._done = 0
        self._running: set[int] = set()
        self._watched: list[Callable[[], bool]] = []
        self._clocks: dict[int, int] = {}  # the CPU time of each thread that has computed
        self._seen = Sign()
        self._grew_at = clock()

    def begin(self, *, on_cpu: bool = True) -> None:
        """This thread computes from now on. on_cpu: its CPU time shows whether the work goes on. Of work on a GPU only
        the end shows it: a host that waits for a GPU uses CPU time in any case."""
        me = threading.get_ident()
        if on_cpu and hasattr(time, "pthread_getcpuclockid"):
            self._clocks[me] = time.pthread_getcpuclockid(me)
        if not self._running:
            self._grew_at = self._clock()
        self._running.add(me)

    def end(self) -> None:
        """This thread has computed what it began."""
        self._running.discard(threading.get_ident())
        self._done = next(self._counter)

    def watch(self, computes: Callable[[], bool]) -> None:
        """This thread computes on the CPU whenever `computes()`, without `begin` and `end`."""
        self.begin()
        self.end()
        self._watched.append(computes)

    def progress(self) -> int:
        """A number that changes while the work goes on."""
        return self._done + sum(map(_used_ns, list(self._clocks.values())))

    def sign(self) -> Sign:
        """Ask often: `stuck_s` counts from the last question that found progress."""
        progress, now = self.progress(), self._clock()
        if progress != self._seen.progress:
            self._grew_at = now
        busy = bool(self._running) or any(computes() for computes in self._watched)
        self._seen = Sign(progress=progress, busy=busy, stuck_s=max(0.0, now - self._grew_at) if busy else 0.0)
        return self._seen


def _used_ns(clock_id: int) -> int:
    try:
        return time.clock_gettime_ns(clock_id)
    except OSError:  # the thread has ended
        return 0
