"""Plans as arrays and back, and how two plans differ.

L: layers in the order of `plan.layer_ids`, E: experts of a layer, S: shards.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cluster.experts.placement import PlacementPlan

Loads = NDArray[np.float64]
Held = NDArray[np.bool_]  # [L, E, S], or [E, S] for one layer: whether the shard holds a copy of the expert


@dataclass(frozen=True, slots=True, order=True)
class PhysicalExpert:
    """One copy of an expert on one shard."""

    layer_id: int
    expert_id: int
    shard_id: int


@dataclass(frozen=True, slots=True)
class Moves:
    """The way from one plan to the next: place all of `added`, publish the plan, then remove `dropped`.

    In between a shard holds the copies of both plans: keep that much memory free, or go in parts (`max_moves`).
    """

    added: tuple[PhysicalExpert, ...]
    dropped: tuple[PhysicalExpert, ...]


def moves(old: PlacementPlan, new: PlacementPlan) -> Moves:
    """The copies that only the new plan has and those that only the old one has, in order of layer, expert, shard."""
    before, after = _physical_experts(old), _physical_experts(new)
    return Moves(added=tuple(sorted(after - before)), dropped=tuple(sorted(before - after)))


def imbalance(plan: PlacementPlan, load: ArrayLike, *, num_shards: int | None = None) -> float:
    """Sum over layers of the highest load of a shard / sum over layers of the mean load: 1.0 is perfect.

    load: [L, E]. The mean is over num_shards shards, by default those that hold anything. 1.0 where there is no load,
    as for a model without experts.
    """
    if not plan.layer_ids:
        return 1.0
    by_shard = shard_load(checked(plan, load), held_by(plan, plan.num_shards))
    mean = by_shard.sum() / (num_shards or sum(any(shard_slice.values()) for shard_slice in plan.slices))
    return float(by_shard.max(axis=1).sum() / mean) if mean > 0 else 1.0


def shard_load(load: Loads, held: Held) -> Loads:
    """[..., E], [..., E, S] -> [..., S]; an expert's load is split evenly over its copies."""
    share = load / np.maximum(held.sum(axis=-1), 1)
    return np.asarray(np.einsum("...e,...es->...s", share, held))


def checked(plan: PlacementPlan, load: ArrayLike) -> Loads:
    """The load as an array of the plan's shape [L, E]. Raises ValueError."""
    array, shape = np.array(load, dtype=np.float64), (len(plan.layer_ids), plan.num_experts)
    if array.shape != shape or not (np.isfinite(array) & (array >= 0)).all():
        raise ValueError(f"load of shape {array.shape}: give {shape} (layers, experts) finite values of 0 or more")
    return array


def held_by(plan: PlacementPlan, num_shards: int) -> Held:
    """[L, E, num_shards], which may be more shards than the plan's."""
    held = np.zeros((len(plan.layer_ids), plan.num_experts, num_shards), dtype=np.bool_)
    for layer, layer_id in enumerate(plan.layer_ids):
        for shard_id, shard_slice in enumerate(plan.slices):
            held[layer, list(shard_slice.get(layer_id, ())), shard_id] = True
    return held


def next_plan(plan: PlacementPlan, held: Held) -> PlacementPlan:
    """The plan's successor. held: [L, E, S]."""
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
