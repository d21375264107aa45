"""Which shard should hold which experts, from measured load. Pure: knows no running shards, no network, no clock.

A layer is a synchronous step that ends with its slowest shard. So what is lowered is the cost: the sum over layers of
the highest load of a shard. What a shard computes over all layers only breaks ties.
L: layers in the order of `plan.layer_ids`, E: experts of a layer, S: shards, P: places that a copy could go to.
Source: DeepSeek's EPLB (copies to the hottest expert, the heaviest first to the lightest shard). Shards of any size,
different shards for the copies of an expert, and few moves are not in it.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cluster.errors import SetupError
from cluster.experts.placement import PlacementPlan

Loads = NDArray[np.float64]
Held = NDArray[np.bool_]  # [L, E, S], or [E, S] for one layer: whether the shard holds a copy of the expert
Counts = NDArray[np.int64]

TOLERANCE = 1e-9  # relative; less is rounding, not gain
MOVE, COPY, SWAP = range(3)
MAX_ROUNDS = 8
GRAIN = 16  # an expert whose copies each have less than a shard's mean load / GRAIN needs no further one
# How to place a layer anew: with how many copies a shard beyond min_copies (the search finds better use for some of
# the places left), and whether an expert rather stays where it is. No way is the best for all loads.
WAYS_ANEW = ((1.0, True), (0.5, True), (np.inf, False))


@dataclass(frozen=True, slots=True, order=True)
class PhysicalExpert:
    """One copy of an expert on one shard."""

    layer_id: int
    expert_id: int
    shard_id: int


@dataclass(frozen=True, slots=True)
class Moves:
    """The way from one plan to the next: load all of `loaded`, publish the plan, then unload `dropped`.

    In between a shard holds the copies of both plans: keep that much memory free, or go in parts (`max_moves`).
    """

    loaded: tuple[PhysicalExpert, ...]
    dropped: tuple[PhysicalExpert, ...]


def moves(old: PlacementPlan, new: PlacementPlan) -> Moves:
    """The copies that only the new plan has and those that only the old one has, in order of layer, expert, shard."""
    before, after = _physical_experts(old), _physical_experts(new)
    return Moves(loaded=tuple(sorted(after - before)), dropped=tuple(sorted(before - after)))


def imbalance(plan: PlacementPlan, load: ArrayLike, *, num_shards: int | None = None) -> float:
    """Sum over layers of the highest load of a shard / sum over layers of the mean load: 1.0 is perfect.

    load: [L, E]. The mean is over num_shards shards, by default those that hold anything. 1.0 where there is no load.
    """
    if not plan.layer_ids:
        return 1.0
    shard_load = _shard_load(_checked(plan, load), _held(plan, plan.num_shards))
    mean = shard_load.sum() / (num_shards or sum(any(shard_slice.values()) for shard_slice in plan.slices))
    return float(shard_load.max(axis=1).sum() / mean) if mean > 0 else 1.0


def rebalance(
    plan: PlacementPlan,
    load: ArrayLike,
    *,
    shards: Sequence[int],
    min_copies: int = 1,
    max_moves: int | None = None,
    min_gain: float = 0.05,
) -> PlacementPlan:
    """A plan with a lower cost and few newly loaded copies; `plan` itself, epoch included, where nothing is gained.

    load: [L, E], tokens or tokens/s, 0 for an expert without traffic; an expert's copies share its load evenly.
    shards: for each shard id, how many physical experts fit in it, all layers together. 0 empties a shard; ids beyond
        the plan's are new shards. Ids never change: an emptied shard keeps its place, with an empty slice.
    min_copies: of each expert, on different shards; fewer where fewer shards have room for anything.
    max_moves: how many copies may be newly loaded; what min_copies and `shards` demand is loaded even beyond that.
    min_gain: a layer, and the plan, stay as they are unless their cost falls by this part of it.
    `shards` bounds the new plan, not the way there: see `Moves`. Deterministic; safe to call from several threads.
    Raises SetupError when the shards cannot hold min_copies, ValueError for a load of the wrong shape, negative or NaN.
    """
    task = _Task.of(plan, load, shards, min_copies)
    needed = task.current.copy()
    _fit(task, needed)
    _complete(task, needed)
    budget = np.inf if max_moves is None else max(max_moves, task.num_moves(needed))
    best = _search(task, needed, budget, min_gain)
    if not _gains(task.cost(needed).sum(), task.cost(best).sum(), min_gain):
        best = needed
    return plan if np.array_equal(best, task.current) else _to_plan(plan, best)


@dataclass(frozen=True, slots=True)
class _Task:
    """One call's input. current: what the plan holds, for all shards; copies: min_copies, capped; capacity: [S];
    quota: [L, S], the capacities split evenly over the layers, what remains dealt to them in turn."""

    load: Loads
    current: Held
    copies: int
    capacity: Counts
    quota: Counts

    @classmethod
    def of(cls, plan: PlacementPlan, load: ArrayLike, shards: Sequence[int], min_copies: int) -> "_Task":
        load = _checked(plan, load)
        if len(shards) < plan.num_shards:
            raise ValueError(f"capacities of {len(shards)} shards for a plan of {plan.num_shards}: 0 empties a shard")
        capacity = np.clip(np.array(shards, dtype=np.int64), 0, load.size)  # a shard holds an expert once at most
        num_open = int((capacity > 0).sum())
        copies = max(1, min(min_copies, num_open))
        if capacity.sum() < load.size * copies:
            raise SetupError(
                f"{num_open} expert shards have room for {capacity.sum()} copies of experts, not for {copies} of each "
                f"of {load.shape[1]} in {load.shape[0]} layers: add shards or memory, or lower --min-copies"
            )
        num_layers = len(load)
        quota = np.tile(capacity // num_layers, (num_layers, 1))
        rest = capacity % num_layers
        dealt = np.repeat(np.arange(len(shards)), rest)
        quota[np.arange(len(dealt)) % num_layers, dealt] += 1
        return cls(load, _held(plan, len(shards)), copies, capacity, quota)

    def cost(self, held: Held) -> Loads:
        """[L]"""
        return np.asarray(_shard_load(self.load, held).max(axis=1))

    def room(self, held: Held) -> Counts:
        """[S]"""
        return np.asarray(self.capacity - held.sum(axis=(0, 1)))

    def num_moves(self, held: Held) -> int:
        return int((held & ~self.current).sum())


def _search(task: _Task, needed: Held, budget: float, min_gain: float) -> Held:
    """From what is needed, the steps that gain most for each newly loaded copy; or layers placed anew, where better.

    In a round, all layers plan for the same free places; who finds them taken has the next round.
    """
    anew = [_place_anew(task, extra, sticky) for extra, sticky in WAYS_ANEW]
    best = needed
    for _ in range(MAX_ROUNDS):
        options: list[_Option] = []
        for layer, now in enumerate(best):
            steps = _improve(task, layer, now, task.room(best))
            options.extend(_options(task, layer, now, [*steps, *(held[layer] for held in anew)]))
        chosen = _choose(task, best, sorted(options, key=_Option.rank), budget, min_gain)
        for held in anew:  # where no layer finds room alone, all of them at once still do
            if task.num_moves(held) <= budget and _gains(task.cost(chosen).sum(), task.cost(held).sum(), min_gain):
                chosen = held
        if chosen is best:
            break
        best = chosen
    return best


@dataclass(frozen=True, slots=True)
class _Option:
    """A way to place one layer. gain: how much its cost falls for num_moves more newly loaded copies than now."""

    layer: int
    held: Held  # [E, S]
    cost: float
    gain: float
    num_moves: int

    def rank(self) -> tuple[float, int, int]:
        """Sorts what gains most for a move first, and what needs none before all."""
        return -self.gain / self.num_moves if self.num_moves > 0 else -np.inf, self.num_moves, self.layer


def _options(task: _Task, layer: int, now: Held, ways: Iterable[Held]) -> Iterator[_Option]:
    """Those ways whose cost is below that of all before them."""
    load, current = task.load[layer], task.current[layer]
    start = lowest = float(_shard_load(load, now).max())
    for held in ways:
        cost = float(_shard_load(load, held).max())
        if _gains(lowest, cost, 0.0):
            lowest = cost
            num_moves = int((held & ~current).sum()) - int((now & ~current).sum())
            yield _Option(layer, held, cost, start - cost, num_moves)


def _choose(task: _Task, held: Held, options: Iterable[_Option], budget: float, min_gain: float) -> Held:
    """Takes the options in turn that gain on what their layer has by then, find room, and keep to the budget."""
    chosen, cost = held, task.cost(held)
    for option in options:
        if not _gains(cost[option.layer], option.cost, min_gain):
            continue
        trial = chosen.copy()
        trial[option.layer] = option.held
        if (task.room(trial) >= 0).all() and task.num_moves(trial) <= budget:
            chosen, cost = trial, task.cost(trial)
    return chosen


def _improve(task: _Task, layer: int, held: Held, room: Counts) -> Iterator[Held]:
    """Yields a layer after each step that relieves its slowest shard, until none does. held: [E, S], room: [S]."""
    held, room = held.copy(), room.copy()
    while edits := _best_step(task.load[layer], held, task.current[layer], room, task.copies):
        for expert, shard_id, value in edits:
            held[expert, shard_id] = value
            room[shard_id] -= 1 if value else -1
        yield held.copy()


def _best_step(load: Loads, held: Held, current: Held, room: Counts, copies: int) -> list[tuple[int, int, bool]]:
    """The edits (expert, shard, held) that relieve a layer's slowest shard most for each newly loaded copy; or none.

    All shards that a step loads end below what the slowest had: sorted loads only fall, so the steps come to an end.
    """
    shard_load = _shard_load(load, held)
    slowest = int(shard_load.argmax())
    evicted, to = np.nonzero(np.vstack([held, room > 0]) & (np.arange(len(room)) != slowest))
    ways = _Ways(slowest, np.flatnonzero(held[:, slowest]), evicted, to)
    relief = shard_load[slowest] - ways.loads_after(load, held, copies)
    relief[relief <= shard_load[slowest] * TOLERANCE] = 0.0
    gain = relief / np.maximum(ways.num_moves(current), 0.5)
    if not gain.any():
        return []
    kind, row, place = np.unravel_index(gain.argmax(), gain.shape)
    expert, other, shard_id = int(ways.hot[row]), int(evicted[place]), int(to[place])
    edits = [(expert, shard_id, True)]
    if kind != COPY:
        edits.append((expert, slowest, False))
    if other != len(load):
        edits.append((other, shard_id, False))
    if kind == SWAP:
        edits.append((other, slowest, True))
    return edits


@dataclass(frozen=True, slots=True)
class _Ways:
    """The ways to relieve a layer's slowest shard. Each of its experts `hot` [H] may go to any of P places: `to` [P],
    a shard, where `evicted` [P] makes way, an expert or E for an empty place. It moves there, or is copied there, or
    swaps: the evicted comes to the slowest shard. Results are [3, H, P], indexed by MOVE, COPY, SWAP."""

    slowest: int
    hot: NDArray[np.intp]
    evicted: NDArray[np.intp]
    to: NDArray[np.intp]

    def loads_after(self, load: Loads, held: Held, copies: int) -> Loads:
        """The highest load of the shards that would get more, and of the slowest; inf for what is not possible."""
        count, shard_load = held.sum(axis=1), _shard_load(load, held)
        here = held[:, self.slowest]
        share = load / count
        others = np.where(held, shard_load, 0.0).max(axis=1) + load / np.maximum(count - 1, 1) - share
        others[(count <= copies) | here] = np.inf  # [E], the shards that compute what the evicted did
        others_after = np.append(others, 0.0)[self.evicted]  # [P]
        freed = np.append(share, 0.0)[self.evicted]
        stays = np.append(here, True)[self.evicted]
        moved, copied = share[self.hot, None], (load / (count + 1))[self.hot, None]  # [H, 1]
        top, there = shard_load[self.slowest], shard_load[self.to] - freed
        after = np.stack(
            [
                np.maximum(np.maximum(top - moved, there + moved), others_after),
                np.maximum(np.maximum(top - moved + copied, there + copied), others_after),
                np.where(stays, np.inf, np.maximum(top - moved + freed, there + moved)),
            ]
        )
        after[:, held[self.hot][:, self.to]] = np.inf
        return after

    def num_moves(self, current: Held) -> Counts:
        """How many newly loaded copies each way adds; less than 0 where it drops some that were to be loaded."""
        new = np.vstack([~current, np.zeros_like(current[:1])]).astype(np.int64)
        copied = new[self.hot][:, self.to] - new[self.evicted, self.to]
        moved = copied - new[self.hot, self.slowest, None]
        return np.stack([moved, copied, moved + new[self.evicted, self.slowest]])


def _place_anew(task: _Task, extra: float, sticky: bool) -> Held:
    """All layers placed within their quotas as if nothing were loaded. See WAYS_ANEW."""
    held = np.zeros_like(task.current)
    total = np.zeros(len(task.capacity))
    for layer, load in enumerate(task.load):
        held[layer] = _pack(load, task.current[layer] & sticky, task.quota[layer], task.copies, extra, total)
        total += _shard_load(load, held[layer])
    _complete(task, held)
    for layer, quota in enumerate(task.quota):
        for step in _improve(task, layer, held[layer], np.clip(quota - held[layer].sum(axis=0), 0, task.room(held))):
            held[layer] = step
    return held


def _pack(load: Loads, home: Held, quota: Counts, copies: int, extra: float, total: Loads) -> Held:
    """One layer: [E, S]. Each further copy to the expert with most load a copy. Then the heaviest first: to a shard
    that has it in `home` while that stays below the mean, else to the lightest. total: [S], breaks ties.

    Where two copies meet on one shard, as in DeepSeek's plans, only one is placed; the search uses the other's place.
    """
    num_shards = int((quota > 0).sum())
    mean = load.sum() / num_shards
    count = np.full(len(load), copies)
    for _ in range(int(min(extra * num_shards, quota.sum() - count.sum()))):
        hottest = (load / count).argmax()
        if load[hottest] * GRAIN <= mean * count[hottest]:
            break
        count[hottest] += 1
    share = load / count
    held = np.zeros_like(home)
    room, shard_load = quota.copy(), np.zeros(len(quota))
    heaviest_first = np.argsort(-share, kind="stable")
    for expert in np.repeat(heaviest_first, count[heaviest_first]):
        stays = home[expert] & ~held[expert] & (shard_load + share[expert] <= mean)
        shard_id = np.lexsort((total, shard_load, ~stays, room <= 0))[0]
        held[expert, shard_id] = True
        room[shard_id] -= 1
        shard_load[shard_id] += share[expert]
    return held


def _complete(task: _Task, held: Held) -> None:
    """Mutates held: adds copies until each expert has as many as it must. Ends, as `_Task.of` has counted: where all
    shards with room hold all that lack a copy, shards without such an expert hold one that a shard with room lacks."""

    def lacking() -> list[tuple[int, int]]:
        at = zip(*np.nonzero(held.sum(axis=2) < task.copies), strict=True)
        return sorted(((int(layer), int(expert)) for layer, expert in at), key=lambda at: -task.load[at])

    while experts := lacking():
        if not sum(_add_copy(task, held, *at) for at in experts):
            _make_way(task, held, *experts[0])


def _add_copy(task: _Task, held: Held, layer: int, expert: int) -> bool:
    """Mutates held: a copy where its layer is within its quota, load is lowest, room is most; false without room."""
    room, used = task.room(held), held[layer].sum(axis=0)
    closed = (room <= 0) | held[layer, expert]
    shard_load = _shard_load(task.load[layer], held[layer])
    shard_id = np.lexsort((-room, shard_load, used >= task.quota[layer], closed))[0]
    held[layer, expert, shard_id] |= not closed[shard_id]
    return bool(~closed[shard_id])


def _make_way(task: _Task, held: Held, layer: int, expert: int) -> None:
    """Mutates held: a place on a shard without the expert. A copy is dropped there, or goes to a shard with room; or
    one is dropped anywhere, so that some shard has room."""
    without = np.flatnonzero((task.capacity > 0) & ~held[layer, expert])
    if any(_drop_spare_copy(task, held, int(shard_id)) for shard_id in without):
        return
    for full, roomy in product(without, np.flatnonzero(task.room(held) > 0)):
        handed = np.argwhere(held[..., full] & ~held[..., roomy])
        if handed.size:
            lightest = handed[task.load[tuple(handed.T)].argmin()]
            held[(*lightest, full)], held[(*lightest, roomy)] = False, True
            return
    for shard_id in range(len(task.capacity)):
        if _drop_spare_copy(task, held, shard_id):
            return


def _fit(task: _Task, held: Held) -> None:
    """Mutates held: drops what a shard has no room for, the least needed first."""
    held[..., task.capacity == 0] = False
    for shard_id in range(len(task.capacity)):
        while task.room(held)[shard_id] < 0:
            if not _drop_spare_copy(task, held, shard_id):
                on_shard = np.argwhere(held[..., shard_id])
                held[(*on_shard[task.load[tuple(on_shard.T)].argmin()], shard_id)] = False


def _drop_spare_copy(task: _Task, held: Held, shard_id: int) -> bool:
    """Mutates held: drops the copy on a shard that raises its layer's cost least; false where all have to stay."""
    rise = np.where(held[..., shard_id], _rise(task, held), np.inf)
    if np.isinf(rise).all():
        return False
    layer, expert = np.unravel_index(rise.argmin(), rise.shape)
    held[layer, expert, shard_id] = False
    return True


def _rise(task: _Task, held: Held) -> Loads:
    """[L, E], by how much at most the layer's cost rises with one copy less of an expert; inf if it has to stay."""
    count, shard_load = held.sum(axis=2), _shard_load(task.load, held)
    growth = task.load / np.maximum(count - 1, 1) - task.load / np.maximum(count, 1)
    grown = np.where(held, shard_load[:, None], 0.0).max(axis=2) + growth
    return np.where(count > task.copies, np.maximum(grown - shard_load.max(axis=1, keepdims=True), 0.0), np.inf)


def _shard_load(load: Loads, held: Held) -> Loads:
    """[..., E], [..., E, S] -> [..., S]; an expert's load is split evenly over its copies."""
    share = load / np.maximum(held.sum(axis=-1), 1)
    return np.asarray(np.einsum("...e,...es->...s", share, held))


def _gains(before: float, after: float, min_gain: float) -> bool:
    return bool(after < before * (1 - max(min_gain, TOLERANCE)))


def _checked(plan: PlacementPlan, load: ArrayLike) -> Loads:
    checked, shape = np.array(load, dtype=np.float64), (len(plan.layer_ids), plan.num_experts)
    if checked.shape != shape or not (np.isfinite(checked) & (checked >= 0)).all():
        raise ValueError(f"load of shape {checked.shape}: give {shape} (layers, experts) finite values of 0 or more")
    return checked


def _held(plan: PlacementPlan, num_shards: int) -> Held:
    held = np.zeros((len(plan.layer_ids), plan.num_experts, num_shards), dtype=np.bool_)
    for layer, layer_id in enumerate(plan.layer_ids):
        for shard_id, shard_slice in enumerate(plan.slices):
            held[layer, list(shard_slice.get(layer_id, ())), shard_id] = True
    return held


def _to_plan(plan: PlacementPlan, held: Held) -> PlacementPlan:
    slices = tuple(
        {
            layer_id: tuple(np.flatnonzero(experts).tolist())
            for layer_id, experts in zip(plan.layer_ids, held[..., shard_id], strict=True)
            if experts.any()
        }
        for shard_id in range(held.shape[2])
    )
    return replace(plan, epoch=plan.epoch + 1, slices=slices)


def _physical_experts(plan: PlacementPlan) -> set[PhysicalExpert]:
    return {
        PhysicalExpert(layer_id, expert_id, shard_id)
        for shard_id, shard_slice in enumerate(plan.slices)
        for layer_id, expert_ids in shard_slice.items()
        for expert_id in expert_ids
    }
