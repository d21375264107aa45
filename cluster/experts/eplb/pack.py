"""A layer placed anew, as if no shard held anything. As DeepSeek's EPLB places it, but for shards of any size.

L, E, S as in `plans`.
"""

import numpy as np

from cluster.experts.eplb.plans import Held, Loads, shard_load
from cluster.experts.eplb.repair import complete
from cluster.experts.eplb.steps import improve
from cluster.experts.eplb.task import Counts, Task

GRAIN = 16  # an expert whose copies each have less than a shard's mean load / GRAIN needs no further one


def place_anew(task: Task, extra: float, *, sticky: bool) -> Held:
    """All layers placed within their quotas, as if no shard held anything: [L, E, S].

    extra: at most so many copies a shard beyond min_copies.  sticky: an expert rather stays on its current shard.
    """
    held = np.zeros_like(task.current)
    total = np.zeros(len(task.capacity))
    for layer, load in enumerate(task.load):
        count = _count_copies(load, task.quota[layer], task.copies, extra)
        held[layer] = _pack(load, count, task.current[layer] & sticky, task.quota[layer], total)
        total += shard_load(load, held[layer])
    complete(task, held)
    for layer, quota in enumerate(task.quota):
        for step in improve(task, layer, held[layer], np.clip(quota - held[layer].sum(axis=0), 0, task.room(held))):
            held[layer] = step
    return held


def _count_copies(load: Loads, quota: Counts, copies: int, extra: float) -> Counts:
    """How many copies each expert of a layer gets: [E]. Each further copy goes to the expert with most load a copy."""
    num_shards = int((quota > 0).sum())
    mean = load.sum() / num_shards
    count = np.full(len(load), copies)
    for _ in range(int(min(extra * num_shards, quota.sum() - count.sum()))):
        hottest = (load / count).argmax()
        if load[hottest] * GRAIN <= mean * count[hottest]:
            break
        count[hottest] += 1
    return count


def _pack(load: Loads, count: Counts, home: Held, quota: Counts, total: Loads) -> Held:
    """One layer: [E, S]. The heaviest copy first: to a shard of its expert's `home` while that stays below the mean,
    else to the lightest shard. count: [E], copies.  total: [S], breaks ties.

    Where two copies would meet on one shard, as in DeepSeek's plans, only one is placed: the search uses the other's
    place.
    """
    mean = load.sum() / int((quota > 0).sum())
    share = load / count
    held = np.zeros_like(home)
    room, by_shard = quota.copy(), np.zeros(len(quota))
    heaviest_first = np.argsort(-share, kind="stable")
    for expert in np.repeat(heaviest_first, count[heaviest_first]):
        stays = home[expert] & ~held[expert] & (by_shard + share[expert] <= mean)
        shard_id = np.lexsort((total, by_shard, ~stays, room <= 0))[0]
        held[expert, shard_id] = True
        room[shard_id] -= 1
        by_shard[shard_id] += share[expert]
    return held
