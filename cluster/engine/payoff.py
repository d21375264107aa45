"""Decides, from measured times, how many drafted tokens a step tries. Knows no tokens and no model.

A drafted token costs a row, and brings a token if it is right. The machine, the model and the batch decide what a row
costs; the text decides how many are right.
"""

from collections import deque
from collections.abc import Sequence

TRIES = 3  # timings that a decision needs, and that it is made from: the least, since all else that runs adds time
RETRY_STEPS = 200  # a size at which drafts do not pay has a step with some once in so many that would have tried more
RETRIES = 2  # then, where the first is not timed: a draft model may have to catch up
PLAIN_STEPS = 50  # and one at which they pay a step without: what a step takes changes with the contexts
FIRST_COST = 0.1  # of a drafted token, in steps without any: low, so that it is measured where it may pay
MARGIN = 1.1  # by which a token must be worth more than it costs: times are noisy

Chance = tuple[int, float]  # how many tokens a draft can have, and the share of them that is expected to be right


class Payoff:
    """Used by one thread."""

    def __init__(self) -> None:
        self._plain: dict[int, deque[float]] = {}  # seconds of a step without drafts, by its sequences
        self._costs: dict[int, deque[float]] = {}  # of a drafted token, in such steps, by the sequences' order
        self._warm: set[int] = set()  # numbers of rows that were computed: the first time of each is not a step's
        self._num_tried = self._num_declined = 0
        self._retries = 0  # that are left of this time

    def lengths(self, chances: Sequence[Chance], room: int) -> list[int]:
        """Returns how many tokens of each sequence's draft a step tries. room: rows that it may have for them."""
        num_sequences = len(chances)
        nothing = [0] * num_sequences
        if not any(most for most, _ in chances) or len(self._plain.get(num_sequences, ())) < TRIES:
            return nothing
        cost = self.cost(num_sequences)
        lengths = best_lengths(chances, cost, room)
        if any(lengths):
            self._num_tried += 1
            return lengths if self._num_tried % PLAIN_STEPS else nothing
        if cost > FIRST_COST:
            hopeful = best_lengths(chances, FIRST_COST, room)
            self._num_declined += any(hopeful)
            if any(hopeful) and self._num_declined % RETRY_STEPS == 0:
                self._retries = RETRIES
            if any(hopeful) and self._retries:
                self._retries -= 1
                return hopeful
        return nothing

    def record(self, num_sequences: int, num_drafted: int, seconds: float) -> None:
        """Takes in the time of a step in which every sequence has one row, and those of its draft."""
        num_rows = num_sequences + num_drafted
        if num_rows not in self._warm:
            self._warm.add(num_rows)
            return
        plain = self._plain.setdefault(num_sequences, deque(maxlen=TRIES))
        if not num_drafted:
            plain.append(seconds)
        elif plain:
            self._retries = 0
            costs = self._costs.setdefault(num_sequences.bit_length(), deque(maxlen=TRIES))
            costs.append(max(0.0, seconds / min(plain) - 1) / num_drafted)

    def cost(self, num_sequences: int) -> float:
        """Of a drafted token, in steps without drafts."""
        costs = self._costs.get(num_sequences.bit_length(), ())
        return min(costs) if len(costs) >= TRIES else FIRST_COST


def best_lengths(chances: Sequence[Chance], cost: float, room: int) -> list[int]:
    """The lengths of drafts that bring the most tokens in the time of a step, `room` in all at most.

    The n-th token of a draft is right with share^n. The likeliest is taken while it raises tokens per time; the time of
    a step without drafts is 1.
    """
    shares = [(share ** (n + 1), i) for i, (most, share) in enumerate(chances) for n in range(most)]
    lengths = [0] * len(chances)
    tokens, time = float(len(chances)), 1.0
    for gain, i in sorted(shares, reverse=True)[: max(0, room)]:
        if gain * time < MARGIN * cost * tokens:
            break
        lengths[i] += 1
        tokens += gain
        time += cost
    return lengths
