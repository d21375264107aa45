"""Whether a shard's work goes on: told by those who compute, read by any thread. Knows no shard and no carrier.

A long computation and one that hangs look alike from outside, but for what they use: a thread that computes on the CPU
uses CPU time, one that waits for ever uses none.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cluster.evolving import evolving


@evolving
@dataclass(frozen=True, slots=True, kw_only=True)
class Sign:
    """A sign of life. progress: grows while work goes on.  busy: there is work now.  stuck_s: since progress last grew,
    0 without work."""

    progress: int = 0
    busy: bool = False
    stuck_s: float = 0.0


class Pulse:
    """All methods may be called from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._base = 0  # of the computations that are over
        self._running: dict[int, tuple[int, int] | None] = {}  # by thread: its CPU clock, and where that stood
        self._seen = Sign()
        self._grew_at = clock()

    @contextmanager
    def computing(self, *, on_cpu: bool = True) -> Iterator[None]:
        """Around a computation of this thread. on_cpu: its CPU time tells whether it goes on; one on a GPU has only its
        end to tell, as a host that waits for a GPU uses CPU time in any case."""
        me = threading.get_ident()
        clock_id = time.pthread_getcpuclockid(me) if on_cpu and hasattr(time, "pthread_getcpuclockid") else None
        started = None if clock_id is None else (clock_id, time.clock_gettime_ns(clock_id))
        with self._lock:
            if not self._running:
                self._grew_at = self._clock()
            self._running[me] = started
        try:
            yield
        finally:
            with self._lock:
                self._base += 1 + _used_ns(self._running.pop(me))

    def progress(self) -> int:
        """Grows while work goes on."""
        with self._lock:
            return self._base + sum(map(_used_ns, self._running.values()))

    def sign(self) -> Sign:
        """Ask more often than what is to be noticed takes: how long work stands still is seen by asking."""
        progress, now = self.progress(), self._clock()
        with self._lock:
            if progress != self._seen.progress:
                self._grew_at = now
            busy = bool(self._running)
            self._seen = Sign(progress=progress, busy=busy, stuck_s=max(0.0, now - self._grew_at) if busy else 0.0)
            return self._seen


def _used_ns(started: tuple[int, int] | None) -> int:
    return 0 if started is None else time.clock_gettime_ns(started[0]) - started[1]
