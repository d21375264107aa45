"""Places experts on shards by measured load. Pure: knows no running shards, no network, no clock.

The algorithm is a greedy local search. A layer is a synchronous step that ends with its slowest shard; the search
lowers the *cost*, the sum over layers of the highest load of a shard. From the current plan it goes, layer by layer, by
the step that relieves the slowest shard most for each copy that has to be added: an expert moves to another shard, is
copied there, or swaps places (`steps`). In each round all layers plan for the same free places, and the best options
within the shards' room and the budget of moves are taken, also whole layers packed anew (`search`). Packing anew is
DeepSeek's EPLB: further copies to the expert with most load a copy, then the heaviest copy first to the lightest shard
(`pack`). EPLB alone starts from nothing, gives every device equally many places, and may put two copies of an expert on
one device. Here shards have any size, the copies of an expert are on different shards, each expert has `min_copies`
(`repair`), and a plan changes only where it gains, by few moves. EPLB's groups of experts and nodes play no part: rows
go to any shard. The load of a shard over all layers only breaks ties.
Source: the README of github.com/deepseek-ai/EPLB; DeepSeek-V3, arXiv 2412.19437, 3.4.1.

`task`: one call's input.  `plans`: from and to `PlacementPlan`.
"""

from cluster.experts.eplb.plans import Moves, PhysicalExpert, imbalance, moves
from cluster.experts.eplb.search import rebalance

__all__ = ["Moves", "PhysicalExpert", "imbalance", "moves", "rebalance"]
