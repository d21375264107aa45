"""Repairs a plan at whatever cost: no shard holds more than fits, and every expert has its copies.

L, E, S as in `plans`.
"""

from itertools import product

import numpy as np

from cluster.experts.eplb.plans import Held, Loads, shard_load
from cluster.experts.eplb.task import Task


def complete(task: Task, held: Held) -> None:
    """Mutates held: adds copies until each expert has as many as it must.

    Ends, because `Task.of` has counted: if all shards with room hold every expert that lacks a copy, each shard without
    such an expert holds another one that some shard with room does not hold.
    """

    def lacking() -> list[tuple[int, int]]:
        at = zip(*np.nonzero(held.sum(axis=2) < task.copies), strict=True)
        return sorted(((int(layer), int(expert)) for layer, expert in at), key=lambda at: -task.load[at])

    while experts := lacking():
        if not sum(_add_copy(task, held, *at) for at in experts):
            _make_way(task, held, *experts[0])


def _add_copy(task: Task, held: Held, layer: int, expert: int) -> bool:
    """Mutates held: adds a copy: where the layer is within its quota, then where load is lowest, then where room is
    most. False if no shard has room."""
    room, used = task.room(held), held[layer].sum(axis=0)
    closed = (room <= 0) | held[layer, expert]
    by_shard = shard_load(task.load[layer], held[layer])
    shard_id = np.lexsort((-room, by_shard, used >= task.quota[layer], closed))[0]
    held[layer, expert, shard_id] |= not closed[shard_id]
    return bool(~closed[shard_id])


def _make_way(task: Task, held: Held, layer: int, expert: int) -> None:
    """Mutates held: makes room on a shard without the expert. Drops a copy there, or hands one on to a shard with room;
    else drops a copy anywhere, so that some shard has room."""
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


def fit(task: Task, held: Held) -> None:
    """Mutates held: drops the copies that a shard has no room for, the least needed first."""
    held[..., task.capacity == 0] = False
    for shard_id in range(len(task.capacity)):
        while task.room(held)[shard_id] < 0:
            if not _drop_spare_copy(task, held, shard_id):
                on_shard = np.argwhere(held[..., shard_id])
                held[(*on_shard[task.load[tuple(on_shard.T)].argmin()], shard_id)] = False


def _drop_spare_copy(task: Task, held: Held, shard_id: int) -> bool:
    """Mutates held: drops the copy on a shard whose loss costs its layer least; false if all have to stay."""
    rise = np.where(held[..., shard_id], _rise(task, held), np.inf)
    if np.isinf(rise).all():
        return False
    layer, expert = np.unravel_index(rise.argmin(), rise.shape)
    held[layer, expert, shard_id] = False
    return True


def _rise(task: Task, held: Held) -> Loads:
    """[L, E]: how much the layer's cost rises at most with one copy less of an expert; inf if all have to stay."""
    count, by_shard = held.sum(axis=2), shard_load(task.load, held)
    growth = task.load / np.maximum(count - 1, 1) - task.load / np.maximum(count, 1)
    grown = np.where(held, by_shard[:, None], 0.0).max(axis=2) + growth
    return np.where(count > task.copies, np.maximum(grown - by_shard.max(axis=1, keepdims=True), 0.0), np.inf)
