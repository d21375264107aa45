"""From a plan to a better one with few moves. See the package's docstring for the algorithm. L, E, S as in `plans`."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from cluster.experts.eplb.pack import place_anew
from cluster.experts.eplb.plans import Held, next_plan, shard_load
from cluster.experts.eplb.repair import complete, fit
from cluster.experts.eplb.steps import improve
from cluster.experts.eplb.task import Task, gains
from cluster.experts.placement import PlacementPlan

MAX_ROUNDS = 8
# How to place layers anew: with how many copies a shard beyond min_copies (the search finds better use for some of the
# places left), and whether an expert rather stays where it is. No way is the best for all loads.
WAYS_ANEW = ((1.0, True), (0.5, True), (np.inf, False))


def rebalance(
    plan: PlacementPlan,
    load: ArrayLike,
    *,
    shards: Sequence[int],
    min_copies: int = 1,
    max_moves: int | None = None,
    min_gain: float = 0.05,
) -> PlacementPlan:
    """A plan with a lower cost and few added copies; `plan` itself, epoch included, where nothing is gained.

    load: [L, E], tokens or tokens/s, 0 for an expert without traffic; an expert's copies share its load evenly.
    shards: for each shard id, how many physical experts fit in it, all layers together. 0 empties a shard; ids beyond
        the plan's are new shards. Ids never change: an emptied shard keeps its place, with an empty slice.
    min_copies: of each expert, on different shards; fewer where fewer shards have room for anything.
    max_moves: how many copies may be added; those that min_copies and `shards` demand are added even beyond that.
    min_gain: a layer, and the plan, stay as they are unless their cost falls by this part of it.
    `shards` bounds the new plan, not the way there: see `Moves`. Deterministic; safe to call from several threads.
    Raises SetupError when the shards cannot hold min_copies, ValueError for a load of the wrong shape, negative or NaN.
    """
    task = Task.of(plan, load, shards, min_copies)
    needed = task.current.copy()
    fit(task, needed)
    complete(task, needed)
    budget = np.inf if max_moves is None else max(max_moves, task.num_moves(needed))
    best = _search(task, needed, budget, min_gain)
    if not gains(task.cost(needed).sum(), task.cost(best).sum(), min_gain):
        best = needed
    return plan if np.array_equal(best, task.current) else next_plan(plan, best)


def _search(task: Task, needed: Held, budget: float, min_gain: float) -> Held:
    """From the needed copies on, the steps that gain most for each added copy; or layers placed anew, where better.

    In a round all layers plan for the same free places; a layer that finds them taken has the next round.
    """
    anew = [place_anew(task, extra, sticky=sticky) for extra, sticky in WAYS_ANEW]
    best = needed
    for _ in range(MAX_ROUNDS):
        options: list[_Option] = []
        for layer, now in enumerate(best):
            steps = improve(task, layer, now, task.room(best))
            options.extend(_options(task, layer, now, [*steps, *(held[layer] for held in anew)]))
        chosen = _choose(task, best, sorted(options, key=_Option.rank), budget, min_gain)
        for held in anew:  # where no layer finds room alone, all of them at once still do
            if task.num_moves(held) <= budget and gains(task.cost(chosen).sum(), task.cost(held).sum(), min_gain):
                chosen = held
        if chosen is best:
            break
        best = chosen
    return best


@dataclass(frozen=True, slots=True)
class _Option:
    """A way to place one layer. gain: how much its cost falls for num_moves more added copies than now."""

    layer: int
    held: Held  # [E, S]
    cost: float
    gain: float
    num_moves: int

    def rank(self) -> tuple[float, int, int]:
        """Sorts by gain for a move, the highest first; options without moves come before all."""
        return -self.gain / self.num_moves if self.num_moves > 0 else -np.inf, self.num_moves, self.layer


def _options(task: Task, layer: int, now: Held, ways: Iterable[Held]) -> Iterator[_Option]:
    """The ways whose cost is below that of all ways before them."""
    load, current = task.load[layer], task.current[layer]
    start = lowest = float(shard_load(load, now).max())
    for held in ways:
        cost = float(shard_load(load, held).max())
        if gains(lowest, cost, 0.0):
            lowest = cost
            num_moves = int((held & ~current).sum()) - int((now & ~current).sum())
            yield _Option(layer, held, cost, start - cost, num_moves)


def _choose(task: Task, held: Held, options: Iterable[_Option], budget: float, min_gain: float) -> Held:
    """Takes the options in turn that gain on what their layer has by then, find room, and keep to the budget."""
    chosen, cost = held, task.cost(held)
    for option in options:
        if not gains(cost[option.layer], option.cost, min_gain):
            continue
        trial = chosen.copy()
        trial[option.layer] = option.held
        if (task.room(trial) >= 0).all() and task.num_moves(trial) <= budget:
            chosen, cost = trial, task.cost(trial)
    return chosen
