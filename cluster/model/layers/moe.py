"""The feed-forward half of a decoder layer: dense SwiGLU, router, shared expert. Routed experts are somewhere else.

T: tokens, H: hidden size, E: routed experts, K: experts a token.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.config import ModelConfig
from cluster.kernels.linear import PackedLinear


class Experts(Protocol):
    """Where routed experts are computed. `dispatch` does not wait; `combine` does."""

    def dispatch(self, layer_id: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Any:
        """hidden_states: [T, H]; topk_ids: [T, K] int64; topk_weights: [T, K] float32. Returns what combine takes."""

    def combine(self, flight: Any) -> Tensor:
        """The weighted sums [T, H] in the dtype of the hidden states. Raises ShardUnavailable."""


class MLP(nn.Module):
    """SwiGLU: a dense layer, or the shared expert."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj: nn.Linear | PackedLinear = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.gate_up_proj: PackedLinear | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_up_proj is None:
            gate, up = self.gate_proj(x), self.up_proj(x)
        else:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        out: Tensor = self.down_proj(F.silu(gate) * up)
        return out

    def pack(self) -> None:
        """Packs the loaded weights; gate and up become one product."""
        self.gate_up_proj = PackedLinear(self.gate_proj, self.up_proj)
        self.down_proj = PackedLinear(self.down_proj)
        del self.gate_proj, self.up_proj


class Router(nn.Module):
    """The gate: probabilities over all experts in float32, then the top k of them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_experts_per_tok = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [T, H]. Returns topk_ids [T, K] int64 and topk_weights [T, K] float32; they sum to 1 only if the config
        has norm_topk_prob."""
        router_logits = F.linear(x, self.weight)  # [T, E]
        router_probs = router_logits.softmax(dim=-1, dtype=torch.float32)
        topk_weights, topk_ids = router_probs.topk(self.num_experts_per_tok, dim=-1)
        if self.norm_topk_prob:
            topk_weights = topk_weights / topk_weights.sum(dim=-1, keepdim=True)
        return topk_ids, topk_weights


class SparseMoe(nn.Module):
    """`out = routed + sigmoid(x · g) * shared(x)`. The shared expert computes while the routed rows are away."""

    def __init__(self, config: ModelConfig, layer_id: int) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.gate = Router(config)
        self.shared_expert = MLP(config.hidden_size, config.shared_expert_intermediate_size)
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def begin(self, x: Tensor, experts: Experts) -> Callable[[], Tensor]:
        """Sends the rows away and computes what is done here. The result waits for them: [T, H], once."""
        flight = experts.dispatch(self.layer_id, x, *self.gate(x))
        shared = torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)  # [T, H]
        return lambda: shared + experts.combine(flight)
