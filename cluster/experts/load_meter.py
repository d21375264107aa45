"""Measures the load of each expert, from counters that grow and start again with their process. Knows no clock."""

from collections.abc import Hashable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Loads = NDArray[np.float64]


class LoadMeter:
    """The load of each expert now: a mean over time in which a second counts half as much half_life_s later.

    `observe` takes the counters of each shard (or any other source), which start at 0 with its process. For one thread.
    """

    def __init__(self, num_layers: int, num_experts: int, *, half_life_s: float) -> None:
        self.half_life_s = half_life_s
        self._last: dict[Hashable, tuple[Loads, float]] = {}
        self._mean = np.zeros((num_layers, num_experts))
        self._started_at: float | None = None
        self._at = 0.0

    def observe(self, source: Hashable, counters: ArrayLike, now: float) -> None:
        """counters: [layers, E], tokens since the source's start; now: seconds, never less than at an earlier call.

        A source's first counters are where it begins. If any counter is lower than before, the source has restarted and
        all its counts are new.
        """
        count = np.array(counters, dtype=np.float64)
        before, then = self._last.get(source, (count, now))
        if source in self._last and now <= then:
            return  # counted with the next ones
        if self._started_at is None:
            self._started_at = self._at = now
        self._mean *= self._decay(now - self._at)
        self._at = now
        if now > then:
            new = count if (count < before).any() else count - before
            self._mean += new / (now - then) * (1 - self._decay(now - then))
        self._last[source] = count, now

    def rates(self, now: float) -> Loads:
        """[layers, E] float64, tokens/s; zeros before a source was observed twice."""
        if self._started_at is None or now <= self._started_at:
            return np.zeros_like(self._mean)
        return self._mean * self._decay(now - self._at) / (1 - self._decay(now - self._started_at))

    def _decay(self, seconds: float) -> float:
        return float(0.5 ** (seconds / self.half_life_s))
