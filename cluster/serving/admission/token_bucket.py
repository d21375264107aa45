"""A rate that may be used up at once and fills again steadily. Knows no calls."""


class TokenBucket:
    """Holds a minute's worth at most. now: seconds of any steady clock."""

    def __init__(self, per_minute: int, now: float) -> None:
        self._per_minute, self._level, self._last = per_minute, float(per_minute), now

    def wait_s(self, now: float) -> float:
        """Returns the seconds until one more may be taken; 0 if one may be taken now."""
        self._level = min(self._per_minute, self._level + (now - self._last) * self._per_minute / 60)
        self._last = now
        return max(0.0, (1 - self._level) * 60 / self._per_minute)

    def take(self, amount: float) -> None:
        """May take more than there is; the next one then waits for it."""
        self._level -= amount
