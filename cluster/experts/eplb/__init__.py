"""Which shard should hold which experts, from measured load."""

from cluster.experts.eplb.search import Moves, PhysicalExpert, imbalance, moves, rebalance

__all__ = ["Moves", "PhysicalExpert", "imbalance", "moves", "rebalance"]
