"""Chooses the shard of each slot of a step, from one layer's copies. Knows no call and no tensor: numpy, on the host.

T: tokens, K: experts a token, E: experts of a layer, C: copies of the most copied expert, S: shards.
"""

from collections.abc import Sequence

import numpy as np

from cluster.experts.adapted_ids import experts_of
from cluster.experts.placement import PlacementPlan
from cluster.experts.transport import NOT_HERE


class Route:
    """The shards that compute each expert of one layer: those that are up, not avoided and not suspected. A condition
    that leaves an expert no shard does not count.

    The rows of an expert with several copies go where the step has least to do. The choice depends on the step's ids
    and on the plan alone.
    """

    def __init__(self, plan: PlacementPlan, layer_id: int, avoid: frozenset[int], suspected: frozenset[int]) -> None:
        self._copies: list[tuple[int, ...]] = []
        for owners in plan.owners(layer_id):
            best = owners
            for worse in (plan.down, avoid, suspected):
                best = tuple(shard_id for shard_id in best if shard_id not in worse) or best
            # Between shards with equally much to do, another one comes first in each layer.
            self._copies.append(tuple(sorted(best, key=lambda shard_id: (shard_id + layer_id) % plan.num_shards)))
        width = max(map(len, self._copies))
        padded = [[*copies, *[copies[0]] * (width - len(copies))] for copies in self._copies]
        # A slot's id - NOT_HERE is its row here: the first one is for empty slots.
        self._shards = np.array([[NOT_HERE] * width, *padded])  # [1 + E, C]
        self._is_copied = np.array([False, *(len(copies) > 1 for copies in self._copies)])  # [1 + E]
        self._fixed = np.where(self._is_copied, plan.num_shards, self._shards[:, 0])  # [1 + E]; copied ones: no shard
        self._fixed[0] = plan.num_shards
        self._num_shards = plan.num_shards

    def shards(self, topk_ids: np.ndarray) -> np.ndarray:
        """Each slot's shard: [T, K] int64, NOT_HERE for an empty slot. topk_ids: [T, K] int64, with adapters or
        without."""
        try:
            return self._chosen(topk_ids)
        except IndexError:
            return self._chosen(experts_of(topk_ids, len(self._copies)))

    def _chosen(self, topk_ids: np.ndarray) -> np.ndarray:
        """Raises IndexError for an id that no expert has."""
        rows = topk_ids - NOT_HERE
        if self._shards.shape[1] == 1:
            only: np.ndarray = self._shards[:, 0][rows]
            return only
        if rows.max(initial=0) >= len(self._shards):
            raise IndexError
        flat = rows.astype(np.int16).ravel()  # numpy sorts 16 bits by radix
        counts = np.bincount(flat, minlength=len(self._shards))  # [1 + E]
        chosen = np.empty(flat.shape, dtype=np.int64)
        chosen[np.argsort(flat, kind="stable")] = np.repeat(self._shards.ravel(), self._quotas(counts).ravel())
        return chosen.reshape(topk_ids.shape)

    def _quotas(self, counts: np.ndarray) -> np.ndarray:
        """Of each expert's rows, those for each of its copies: [1 + E, C]. counts: [1 + E].

        One pass, the experts with most rows first: small ones even out what these leave uneven.
        """
        quotas = np.zeros(self._shards.shape, dtype=np.int64)
        quotas[:, 0] = counts
        work: list[int] = (
            np.bincount(self._fixed, weights=counts, minlength=self._num_shards + 1).astype(np.int64).tolist()
        )
        copied = np.flatnonzero(self._is_copied & (counts > 0))
        for row in copied[np.argsort(-counts[copied], kind="stable")].tolist():
            copies = self._copies[row + NOT_HERE]
            quotas[row, : len(copies)] = fill(work, copies, int(counts[row]))
        return quotas


def fill(work: list[int], shards: Sequence[int], num_rows: int) -> list[int]:
    """Shares rows out to the shards with least to do, as water finds its level. Returns each shard's rows.

    work: the rows of every shard so far; it takes in the new ones.
    """
    order = sorted(range(len(shards)), key=lambda i: work[shards[i]])
    total, wet = num_rows, 0
    for i in order:  # the next shard gets rows if its work lies below the level that the others would reach
        if wet and total <= work[shards[i]] * wet:
            break
        total += work[shards[i]]
        wet += 1
    level, rest = divmod(total, wet)
    given = [0] * len(shards)
    for place, i in enumerate(order[:wet]):
        given[i] = level + (place < rest) - work[shards[i]]
        work[shards[i]] += given[i]
    return given
