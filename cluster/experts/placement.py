"""The plan of which shard holds which physical experts. Pure values; knows no weights and no network."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.errors import SetupError
from cluster.evolving import evolving


@evolving("cluster.experts.placement")
@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementPlan:
    """A frozen plan. `slices[shard][layer_id]` are the ids of the experts that the shard holds a copy of.

    epoch: grows with every change, a respawned shard included; callers compare it, nothing else.
    down: shards that do not answer at the moment; their copies count as placed.
    Raises ValueError for an expert that no shard holds: a plan never lacks one.
    """

    epoch: int
    num_experts: int
    slices: tuple[Mapping[int, tuple[int, ...]], ...]
    down: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        for layer_id in self.layer_ids:
            held = {expert for s in self.slices for expert in s.get(layer_id, ())}
            if held != set(range(self.num_experts)):
                lacking = sorted(set(range(self.num_experts)) - held) or sorted(held - set(range(self.num_experts)))
                raise ValueError(f"layer {layer_id}: experts {lacking} are on no shard or unknown")

    @property
    def num_shards(self) -> int:
        return len(self.slices)

    @property
    def layer_ids(self) -> tuple[int, ...]:
        return tuple(sorted({layer_id for s in self.slices for layer_id in s}))

    def owners(self, layer_id: int) -> list[tuple[int, ...]]:
        """For each expert of a layer, the shards that hold a copy, in the order of their ids."""
        owners: list[list[int]] = [[] for _ in range(self.num_experts)]
        for shard_id, shard_slice in enumerate(self.slices):
            for expert in shard_slice.get(layer_id, ()):
                owners[expert].append(shard_id)
        return [tuple(shards) for shards in owners]


def num_shards_for(num_experts: int, asked: int) -> int:
    """The shards to have: none for a dense model, whatever number was asked for."""
    return asked if num_experts else 0


def plan_evenly(layer_ids: Sequence[int], num_experts: int, num_shards: int, *, epoch: int = 1) -> PlacementPlan:
    """Contiguous slices, one copy of each expert, the same in every layer; sizes differ by one at most.

    60 experts on 7 shards: 9, 9, 9, 9, 8, 8, 8. A dense model has an empty plan, on no shard. Raises SetupError for
    more shards than experts.
    """
    if num_experts == num_shards == 0:
        return PlacementPlan(epoch=epoch, num_experts=0, slices=())
    if not 1 <= num_shards <= num_experts:
        raise SetupError(
            f"{num_shards} expert shards for {num_experts} experts a layer: ask for 1 to {num_experts} shards"
        )
    size, rest = divmod(num_experts, num_shards)
    slices, start = [], 0
    for shard_id in range(num_shards):
        stop = start + size + (shard_id < rest)
        slices.append({layer_id: tuple(range(start, stop)) for layer_id in layer_ids})
        start = stop
    return PlacementPlan(epoch=epoch, num_experts=num_experts, slices=tuple(slices))


def swapped(plan: PlacementPlan, num_swaps: int, seed: int) -> PlacementPlan:
    """The plan with pairs of experts, num_swaps at most, that changed shards; each shard has as many as before."""
    rng = random.Random(seed)
    slices = [dict(layers) for layers in plan.slices]
    filled = [i for i, layers in enumerate(slices) if layers]
    for _ in range(num_swaps if len(filled) > 1 else 0):
        layer_id = rng.choice(plan.layer_ids)
        a, b = rng.sample(filled, 2)
        ours, theirs = (set(slices[i].get(layer_id, ())) for i in (a, b))
        if ours - theirs and theirs - ours:
            out, back = rng.choice(sorted(ours - theirs)), rng.choice(sorted(theirs - ours))
            slices[a][layer_id] = tuple(sorted(ours - {out} | {back}))
            slices[b][layer_id] = tuple(sorted(theirs - {back} | {out}))
    return replace(plan, slices=tuple(slices))
