"""Which copy of an expert a row goes to. Pure: knows a plan, and which shards to avoid.

T: tokens, K: experts a token, E: experts of a layer, C: copies of the most copied expert.
"""

import torch
from torch import Tensor

from cluster.experts.placement import PlacementPlan
from cluster.experts.transport import NOT_HERE


class Route:
    """Which shard computes an expert of one layer: of its copies those that are up and not avoided, without the
    suspected ones where that leaves any.

    copies: [E, C] int64 shard ids, an expert's own repeated to the width of the most copied one.  counts: [E] int64.
    """

    def __init__(
        self,
        plan: PlacementPlan,
        layer_id: int,
        avoid: frozenset[int],
        suspected: frozenset[int],
        device: torch.device,
    ) -> None:
        chosen: list[tuple[int, ...]] = []
        for owners in plan.owners(layer_id):
            best = owners
            for worse in (plan.down, avoid, suspected):
                best = tuple(shard_id for shard_id in best if shard_id not in worse) or best
            chosen.append(best)
        width = max(map(len, chosen))
        self.counts = torch.tensor([len(shards) for shards in chosen], device=device)
        self.copies = torch.tensor(
            [[shards[i % len(shards)] for i in range(width)] for shards in chosen], device=device
        )

    def shards(self, topk_ids: Tensor) -> Tensor:
        """[T, K] int64: each slot's shard, NOT_HERE where the slot is empty. An expert's rows take its copies in turn.

        topk_ids: [T, K] int64.
        """
        ids = topk_ids.clamp_min(0)
        if self.copies.shape[1] == 1:
            shards = self.copies[:, 0][ids]
        else:
            rows = torch.arange(ids.shape[0], device=ids.device).unsqueeze(1)
            shards = self.copies[ids, (rows + ids) % self.counts[ids]]
        return torch.where(topk_ids >= 0, shards, NOT_HERE)
