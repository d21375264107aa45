"""Times several ways to compute one thing in turns. Knows no kernel."""

import math
from collections.abc import Callable, Mapping

from cluster.bench.kernels.case import Call

PASS_S = 0.02  # of one way before it is the next one's turn
_TIMED_S = 2e-4  # calls that are shorter are timed together: the clock takes time too


def least_seconds(ways: Mapping[str, Call], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Returns the least seconds of a call of each way over all rounds: what a call takes when nothing else disturbs it.

    The ways take turns: if the machine's speed wanders, it wanders for all. They share one count of turns, so that none
    finds in the caches what the one before has read.
    """
    turn = 0

    def timed(call: Call, count: int) -> float:
        nonlocal turn
        started = clock()
        for _ in range(count):
            call(turn)
            turn += 1
        return clock() - started

    counts: dict[str, int] = {}
    for way, call in ways.items():
        timed(call, 1)  # makes what later calls find
        counts[way] = max(1, math.ceil(_TIMED_S / max(timed(call, 1), 1e-9)))
    least = dict.fromkeys(ways, math.inf)
    for _ in range(rounds):
        for way, call in ways.items():
            spent = 0.0
            while spent < PASS_S:
                took = timed(call, counts[way])
                least[way] = min(least[way], took / counts[way])
                spent += took
    return least
