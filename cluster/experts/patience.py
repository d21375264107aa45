"""How long answers may take, from what answers took lately. Knows no shard, no plan and no clock."""

from dataclasses import dataclass

HEDGE_FLOOR_S = 0.1  # rows go to another copy at the earliest after so long: 50 times a healthy round trip (1 to 2 ms)
HEDGE_CEILING_S = 5.0  # and at the latest after so long
HEDGE_UNKNOWN_S = 1.0  # before anything is known
HEDGE_SHARE = 0.05  # of all sendings may be such second ones, so that a slow cluster does not get twice the traffic
HEDGE_BURST = 10.0
HUNG_S = 5.0  # a step that can lose rows waits so long for a shard that was silent, the next one twice as long, …


@dataclass(slots=True)
class _Waits:
    """Recent waits for an answer. An unusual one is longer than the mean and four mean deviations, after which TCP
    sends again (RFC 6298, with its 1/8 and 1/4)."""

    mean_s: float = -1.0
    deviation_s: float = 0.0

    def add(self, seconds: float) -> None:
        if self.mean_s < 0:
            self.mean_s, self.deviation_s = seconds, seconds / 2
        else:
            self.deviation_s += (abs(seconds - self.mean_s) - self.deviation_s) / 4
            self.mean_s += (seconds - self.mean_s) / 8

    @property
    def unusual_s(self) -> float:
        return self.mean_s + 4 * self.deviation_s


class Patience:
    """One dispatcher's patience. shard_timeout_s: the longest silence that it allows a shard."""

    def __init__(self, shard_timeout_s: float) -> None:
        self._shard_timeout_s = shard_timeout_s
        self._waits: dict[int, _Waits] = {}  # by the number of bits in the number of rows
        self._hedges = HEDGE_BURST

    def answered(self, num_rows: int, seconds: float) -> None:
        """seconds: from when the answer was waited for, not from when its rows were sent. An answer that was there
        before, because another one was late, says nothing."""
        self._waits.setdefault(num_rows.bit_length(), _Waits()).add(seconds)

    def late_s(self, num_rows: int) -> float:
        """How long an answer may take before other copies are asked too."""
        waits = self._waits.get(num_rows.bit_length())
        expected = HEDGE_UNKNOWN_S if waits is None else waits.unusual_s
        return min(HEDGE_CEILING_S, max(HEDGE_FLOOR_S, expected))

    def silence_s(self, num_silences: int) -> float:
        """How long a shard may be silent before its call counts as lost.

        num_silences: calls in a row that it failed by silence. After the first the time is short, then it doubles.
        """
        if not num_silences:
            return self._shard_timeout_s
        return min(self._shard_timeout_s, HUNG_S * 2.0 ** min(num_silences - 1, 10))

    def sent(self) -> None:
        """Rows were sent, which allows a part of another hedge."""
        self._hedges = min(HEDGE_BURST, self._hedges + HEDGE_SHARE)

    @property
    def allows_hedge(self) -> bool:
        return self._hedges >= 1.0

    def hedged(self) -> None:
        self._hedges -= 1.0
