"""Advises a refused client to come again when about half of those before it have ended."""

MIN_S, MAX_S = 0.1, 60.0


class RetryHint:
    """Follows how often something ends. now: seconds of any steady clock."""

    def __init__(self, now: float) -> None:
        self._last, self._interval_s = now, 0.0

    def ended(self, now: float) -> None:
        self._interval_s += 0.1 * (now - self._last - self._interval_s)
        self._last = now

    def seconds(self, num_before: int) -> float:
        """Returns how long to wait. num_before: clients that came earlier."""
        return min(MAX_S, max(MIN_S, num_before / 2 * self._interval_s))
