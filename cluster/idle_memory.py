"""Gives memory that large steps have freed back to the system, once this process rests.

While it computes, freed memory stays with it (`MALLOC_ENVIRONMENT`). A prefill of 32 x 64 tokens of Qwen1.5-MoE-A2.7B's
shapes leaves 330 MB. To give them back takes 60 ms, and the next prefill is 6 to 8 % slower, as it takes pages anew.
"""

import ctypes
import threading
import time
from collections.abc import Callable

LARGE_ROWS = 256  # fewer rows leave 20 MB or less
REST_S = 10.0


class IdleMemory:
    """release: gives free memory back. clock, in seconds, and sleep are `time`'s but for tests."""

    def __init__(
        self,
        release: Callable[[], object],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
        rest_s: float = REST_S,
    ) -> None:
        self._release, self._clock, self._sleep, self._rest_s = release, clock, sleep, rest_s
        self._worked_at = 0.0
        self._is_large = threading.Event()
        self._thread: threading.Thread | None = None

    def worked(self, num_rows: int) -> None:
        """A step of so many rows has ended. Returns at once; called by one thread at a time."""
        self._worked_at = self._clock()
        if num_rows < LARGE_ROWS:
            return
        self._is_large.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="idle-memory", daemon=True)
            self._thread.start()

    def release_when_idle(self) -> None:
        """Waits for a large step, then for a rest of rest_s, and gives back what is free."""
        self._is_large.wait()
        while (left_s := self._worked_at + self._rest_s - self._clock()) > 0:
            self._sleep(left_s)
        self._is_large.clear()
        self._release()

    def _watch(self) -> None:
        while True:
            self.release_when_idle()


def give_back() -> None:
    """Gives what is free in this process's heap back to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


idle_memory = IdleMemory(give_back)  # a process has one heap
