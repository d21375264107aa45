"""A moment by which something has to happen. Knows a clock and nothing else."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class Deadline:
    """clock: seconds that only grow.  at: the moment, in the clock's seconds."""

    clock: Callable[[], float]
    at: float

    @classmethod
    def after(cls, clock: Callable[[], float], seconds: float) -> "Deadline":
        return cls(clock, clock() + seconds)

    @property
    def is_over(self) -> bool:
        return self.clock() >= self.at

    @property
    def left_s(self) -> float:
        """0 when it is over."""
        return max(0.0, self.at - self.clock())

    def earlier(self, at: float) -> "Deadline":
        """This one, or `at` if that comes first."""
        return Deadline(self.clock, min(self.at, at))

    def postpone(self, at: float) -> None:
        """Never to an earlier moment."""
        self.at = max(self.at, at)
