"""The feed-forward half of a layer with routed experts: router and shared expert. The routed experts are elsewhere.

T: tokens, H: hidden size, E: routed experts, K: experts a token.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from cluster.config import MoeConfig
from cluster.kernels.router import route
from cluster.model.layers.feed_forward import MLP, Experts
from cluster.model.layers.linear import Linear
from cluster.model.layers.lora import LayerAdapters


class Router(nn.Module):
    """The gate: probabilities over all experts in float32, then the top k of them."""

    def __init__(self, moe: MoeConfig, hidden_size: int) -> None:
        super().__init__()
        self.num_experts_per_tok = moe.num_experts_per_tok
        self.norm_topk_prob = moe.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(moe.num_experts, hidden_size))
        self.outputs = {"gate": moe.num_experts}  # as a `Linear` has it, for adapters

    def forward(self, x: Tensor, adapters: LayerAdapters | None = None) -> tuple[Tensor, Tensor]:
        """x: [T, H]. Returns topk_ids [T, K] int64 and topk_weights [T, K] float32; they sum to 1 only if the config
        has norm_topk_prob."""
        change = None if adapters is None else partial(adapters.add, "mlp.gate", x)
        return route(x, self.weight, self.num_experts_per_tok, normalize=self.norm_topk_prob, change=change)


class SparseMoe(nn.Module):
    """`out = routed + sigmoid(x · g) * shared(x)`. The shared expert computes while the routed rows are away."""

    def __init__(self, moe: MoeConfig, hidden_size: int, layer_id: int) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.gate = Router(moe, hidden_size)
        self.shared_expert = MLP(hidden_size, moe.shared_expert_intermediate_size, "mlp.shared_expert")
        self.shared_expert_gate = Linear(hidden_size, {"shared_expert_gate": 1})

    def begin(self, x: Tensor, experts: Experts | None, adapters: LayerAdapters | None = None) -> Callable[[], Tensor]:
        """As `FeedForward.begin`: sends the routed rows away, then computes the shared expert."""
        flight = None if experts is None else experts.dispatch(self.layer_id, x, *self.gate(x, adapters))
        gate = self.shared_expert_gate(x)
        if adapters is not None:
            adapters.add("mlp.shared_expert_gate", x, gate)
        shared = torch.sigmoid(gate) * self.shared_expert(x, adapters)  # [T, H]
        return (lambda: shared) if experts is None else lambda: shared + experts.combine(flight)
