"""How many experts fit in each shard, and the plans that begin a cluster or a change. Pure functions."""

from dataclasses import replace

from cluster.config import ClusterConfig
from cluster.experts import eplb
from cluster.experts.placement import PlacementPlan, plan_evenly
from cluster.runtime.control.expert_facts import ExpertFacts
from cluster.runtime.workers.protocol import Slice


def capacities(config: ClusterConfig, facts: ExpertFacts, num_shards: int) -> list[int]:
    """For each shard, all layers together."""
    if config.expert_memory_bytes is not None:
        room = config.expert_memory_bytes // facts.expert_bytes
    else:
        wanted = len(facts.sparse_layers) * (facts.num_experts * config.min_copies + config.redundant_experts)
        room = -(-wanted // num_shards)
    room = min(room, len(facts.sparse_layers) * facts.num_experts)  # a shard holds an expert once at most
    return [room] * num_shards


def first_plan(config: ClusterConfig, facts: ExpertFacts, num_shards: int) -> PlacementPlan:
    """Even slices; copies where the configuration asks for them. Without a shard where the model is dense. Raises
    SetupError."""
    plan = plan_evenly(facts.sparse_layers, facts.num_experts, num_shards, epoch=0)
    if num_shards and (config.min_copies > 1 or config.redundant_experts):
        even = [[1.0] * facts.num_experts for _ in facts.sparse_layers]
        shards = capacities(config, facts, num_shards)
        plan = eplb.rebalance(plan, even, shards=shards, min_copies=config.min_copies)
    return replace(plan, epoch=0)


def padded(plan: PlacementPlan, num_shards: int) -> PlacementPlan:
    """The plan with empty slices for shards that are new."""
    if plan.num_shards >= num_shards:
        return plan
    return replace(plan, slices=(*plan.slices, *({} for _ in range(num_shards - plan.num_shards))))


def union(first: Slice, second: Slice) -> dict[int, tuple[int, ...]]:
    """The experts of both."""
    return {
        layer_id: tuple(sorted({*first.get(layer_id, ()), *second.get(layer_id, ())}))
        for layer_id in sorted({*first, *second})
    }
