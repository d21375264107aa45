"""The steps that relieve one layer's slowest shard: an expert moves, is copied, or swaps places. E, S as in `plans`."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.experts.eplb.plans import Held, Loads, shard_load
from cluster.experts.eplb.task import TOLERANCE, Counts, Task

MOVE, COPY, SWAP = range(3)


def improve(task: Task, layer: int, held: Held, room: Counts) -> Iterator[Held]:
    """Yields a layer after each step that relieves its slowest shard, until no step does. held: [E, S], room: [S]."""
    held, room = held.copy(), room.copy()
    while edits := _best_step(task.load[layer], held, task.current[layer], room, task.copies):
        for expert, shard_id, value in edits:
            held[expert, shard_id] = value
            room[shard_id] -= 1 if value else -1
        yield held.copy()


def _best_step(load: Loads, held: Held, current: Held, room: Counts, copies: int) -> list[tuple[int, int, bool]]:
    """The edits (expert, shard, held) that relieve a layer's slowest shard most for each added copy; or no edits.

    Every shard that gets load in a step ends below the slowest one's load before it: the sorted loads only fall, so the
    steps come to an end.
    """
    by_shard = shard_load(load, held)
    slowest = int(by_shard.argmax())
    evicted, to = np.nonzero(np.vstack([held, room > 0]) & (np.arange(len(room)) != slowest))
    ways = _Ways(slowest, np.flatnonzero(held[:, slowest]), evicted, to)
    relief = by_shard[slowest] - ways.loads_after(load, held, copies)
    relief[relief <= by_shard[slowest] * TOLERANCE] = 0.0
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
    """The ways to relieve a layer's slowest shard.

    hot: [H], the shard's experts. Each may go to any of P places.  to: [P], the place's shard.
    evicted: [P], the expert that makes way at the place, or E where the place is empty.
    The hot expert moves to the place, or is copied there, or swaps: then the evicted expert comes to the slowest shard.
    Results are [3, H, P], indexed by MOVE, COPY, SWAP.
    """

    slowest: int
    hot: NDArray[np.intp]
    evicted: NDArray[np.intp]
    to: NDArray[np.intp]

    def loads_after(self, load: Loads, held: Held, copies: int) -> Loads:
        """The highest load among the slowest shard and those that would get more; inf for an impossible way."""
        count, by_shard = held.sum(axis=1), shard_load(load, held)
        here = held[:, self.slowest]
        share = load / count
        others = np.where(held, by_shard, 0.0).max(axis=1) + load / np.maximum(count - 1, 1) - share
        others[(count <= copies) | here] = np.inf  # [E], the shards that compute the evicted one's share then
        others_after = np.append(others, 0.0)[self.evicted]  # [P]
        freed = np.append(share, 0.0)[self.evicted]
        stays = np.append(here, True)[self.evicted]
        moved, copied = share[self.hot, None], (load / (count + 1))[self.hot, None]  # [H, 1]
        top, target = by_shard[self.slowest], by_shard[self.to] - freed
        after = np.stack(
            [
                np.maximum(np.maximum(top - moved, target + moved), others_after),
                np.maximum(np.maximum(top - moved + copied, target + copied), others_after),
                np.where(stays, np.inf, np.maximum(top - moved + freed, target + moved)),
            ]
        )
        after[:, held[self.hot][:, self.to]] = np.inf
        return after

    def num_moves(self, current: Held) -> Counts:
        """How many copies each way adds to the current ones; less than 0 where it drops some that were to be added."""
        new = np.vstack([~current, np.zeros_like(current[:1])]).astype(np.int64)
        copied = new[self.hot][:, self.to] - new[self.evicted, self.to]
        moved = copied - new[self.hot, self.slowest, None]
        return np.stack([moved, copied, moved + new[self.evicted, self.slowest]])
