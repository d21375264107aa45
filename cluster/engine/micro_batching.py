"""Decides, from measured times, whether a step is split so that one part computes while the other is at its experts.

Splitting hides the crossing, but reads weights twice. The machine, the carrier and the step's size decide if it pays,
so both ways are tried now and then for each size, and the faster one is kept.
"""

import statistics
from collections import deque
from collections.abc import Sequence

from cluster.engine.step import ScheduledSequence

MIN_TOKENS = 64  # smaller steps are bound by reading weights, which a split reads twice
TRIES = 3  # timings of each kind before one is chosen, and kept to choose by
RETRY_STEPS = 200  # then the slower kind gets one step in so many: machines change


class MicroBatching:
    """Used by one thread."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self._times: dict[tuple[int, int], deque[float]] = {}  # seconds a token, by size and number of parts
        self._steps: dict[int, int] = {}

    def choose(self, num_tokens: int, num_sequences: int) -> int:
        """Returns the number of parts that a step is split into: 1 or 2."""
        if not self._has_choice(num_tokens, num_sequences):
            return 1
        size = num_tokens.bit_length()
        self._steps[size] = step = self._steps.get(size, 0) + 1
        counts = [len(self._times.get((size, parts), ())) for parts in (1, 2)]
        if min(counts) < TRIES:
            return 1 if counts[0] <= counts[1] else 2
        medians = [statistics.median(self._times[size, parts]) for parts in (1, 2)]
        faster, slower = (1, 2) if medians[0] <= medians[1] else (2, 1)
        return slower if step % RETRY_STEPS == 0 else faster

    def record(self, num_tokens: int, num_sequences: int, parts: int, seconds: float) -> None:
        """Takes in the time of a step."""
        if self._has_choice(num_tokens, num_sequences):
            times = self._times.setdefault((num_tokens.bit_length(), parts), deque(maxlen=TRIES))
            times.append(seconds / num_tokens)

    def _has_choice(self, num_tokens: int, num_sequences: int) -> bool:
        return self.enabled and num_sequences >= 2 and num_tokens >= MIN_TOKENS


def split_evenly(scheduled: Sequence[ScheduledSequence], parts: int) -> list[Sequence[ScheduledSequence]]:
    """Splits between sequences, in their order, where the tokens are nearest to halves (thirds, …)."""
    total = sum(s.num_rows for s in scheduled)
    cuts, taken = [0], 0
    for i, s in enumerate(scheduled):
        if len(cuts) < parts and i > cuts[-1] and taken + s.num_rows / 2 > total * len(cuts) / parts:
            cuts.append(i)
        taken += s.num_rows
    return [scheduled[a:b] for a, b in zip(cuts, [*cuts[1:], len(scheduled)], strict=True)]
