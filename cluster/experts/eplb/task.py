"""One call's input, and what follows from it at once: cost, room, number of moves. L, E, S as in `plans`."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cluster.errors import SetupError
from cluster.experts.eplb.plans import Held, Loads, checked, held_by, shard_load
from cluster.experts.placement import PlacementPlan

Counts = NDArray[np.int64]

TOLERANCE = 1e-9  # relative; less is rounding, not gain


@dataclass(frozen=True, slots=True)
class Task:
    """current: the plan's copies, with columns for new shards; copies: min_copies, capped; capacity: [S];
    quota: [L, S], the capacities split evenly over the layers, the remainders dealt to them in turn."""

    load: Loads
    current: Held
    copies: int
    capacity: Counts
    quota: Counts

    @classmethod
    def of(cls, plan: PlacementPlan, load: ArrayLike, shards: Sequence[int], min_copies: int) -> "Task":
        load = checked(plan, load)
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
        return cls(load, held_by(plan, len(shards)), copies, capacity, quota)

    def cost(self, held: Held) -> Loads:
        """[L]"""
        return np.asarray(shard_load(self.load, held).max(axis=1))

    def room(self, held: Held) -> Counts:
        """[S]"""
        return np.asarray(self.capacity - held.sum(axis=(0, 1)))

    def num_moves(self, held: Held) -> int:
        """How many copies are added to the current ones."""
        return int((held & ~self.current).sum())


def gains(before: float, after: float, min_gain: float) -> bool:
    """Whether a cost falls by this part of it, and by more than rounding."""
    return bool(after < before * (1 - max(min_gain, TOLERANCE)))
