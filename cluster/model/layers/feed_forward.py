"""The feed-forward half of a decoder layer: how it is called, and the dense kind. Attribute names are the checkpoint's.

T: tokens, H: hidden size, K: experts a token.
"""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from cluster.model.layers.linear import Linear


class Experts(Protocol):
    """Computes routed experts, wherever they are. `dispatch` does not wait; `combine` does."""

    def dispatch(self, layer_id: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Any:
        """hidden_states: [T, H]; topk_ids: [T, K] int64; topk_weights: [T, K] float32. Returns a flight for combine."""

    def combine(self, flight: Any) -> Tensor:
        """The weighted sums [T, H] in the dtype of the hidden states. Raises ShardUnavailable."""


class FeedForward(Protocol):
    """Either kind, dense or with routed experts."""

    def begin(self, x: Tensor, experts: Experts) -> Callable[[], Tensor]:
        """x: [T, H]. Computes up to where routed rows are waited for. Call the result once: it waits, gives [T, H]."""


class MLP(nn.Module):
    """SwiGLU: a dense layer, or the shared expert."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, {"gate_proj": intermediate_size, "up_proj": intermediate_size})
        self.down_proj = Linear(intermediate_size, {"down_proj": hidden_size})

    def forward(self, x: Tensor) -> Tensor:
        return self.gate_up_proj.weight.swiglu(x, self.down_proj.weight)

    def begin(self, x: Tensor, experts: Experts) -> Callable[[], Tensor]:
        """As `FeedForward.begin`, with nothing to wait for."""
        out: Tensor = self(x)
        return lambda: out
