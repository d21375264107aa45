"""Faults that `moe-cluster chaos` asks a running shard to show. A shard that nobody asks shows none."""

import time
from collections.abc import Callable
from typing import Literal, Protocol

SLOW_S = 0.3  # for each product of a slow shard: longer than any patience for a copy

Disturbance = Literal["cut", "damage", "slow", "no memory"]


class Streams(Protocol):
    """The part of a `StreamServer` that can break."""

    def cut(self) -> None: ...

    def damage(self) -> None: ...


class Rehearsal:
    """A shard calls it before what may fail."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._clock, self._sleep = clock, sleep
        self._slow_until = clock()
        self._refuses_load = False

    def begin(self, what: Disturbance, seconds: float, streams: Streams | None) -> None:
        """Ends all streams, damages the next answer on one, computes slowly for some seconds, or finds no memory for
        the next load."""
        if what == "cut" and streams is not None:
            streams.cut()
        elif what == "damage" and streams is not None:
            streams.damage()
        elif what == "slow":
            self._slow_until = self._clock() + seconds
        elif what == "no memory":
            self._refuses_load = True

    @property
    def is_quiet(self) -> bool:
        """Whether `before_product` does nothing now."""
        return self._clock() >= self._slow_until

    def before_load(self) -> None:
        """Raises MemoryError once after "no memory"."""
        if self._refuses_load:
            self._refuses_load = False
            raise MemoryError("no memory, as a rehearsal")

    def before_product(self) -> None:
        """Takes its time while "slow" lasts."""
        if self._clock() < self._slow_until:
            self._sleep(SLOW_S)
