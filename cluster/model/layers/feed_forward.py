"""The feed-forward half of a decoder layer: how it is called, and the dense kind. Attribute names are the checkpoint's.

T: tokens, H: hidden size, K: experts a token.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from cluster.model.layers.linear import Linear
from cluster.model.layers.lora import LayerAdapters


class Experts(Protocol):
    """Computes routed experts, wherever they are. `dispatch` does not wait; `combine` does."""

    def dispatch(self, layer_id: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Any:
        """hidden_states: [T, H]; topk_ids: [T, K] int64; topk_weights: [T, K] float32. Returns a flight for combine."""

    def combine(self, flight: Any) -> Tensor:
        """The weighted sums [T, H] in the dtype of the hidden states. Raises ShardUnavailable."""


class FeedForward(Protocol):
    """Either kind, dense or with routed experts."""

    def begin(self, x: Tensor, experts: Experts | None, adapters: LayerAdapters | None = None) -> Callable[[], Tensor]:
        """x: [T, H]. Computes up to where routed rows are waited for. Call the result once: it waits, gives [T, H].

        experts: None for the part without routed rows."""


class MLP(nn.Module):
    """SwiGLU: a dense layer, or the shared expert. name: below the layer's."""

    def __init__(self, hidden_size: int, intermediate_size: int, name: str = "mlp") -> None:
        super().__init__()
        self._gate_up, self._down = f"{name}.gate_up_proj", f"{name}.down_proj"
        self.gate_up_proj = Linear(hidden_size, {"gate_proj": intermediate_size, "up_proj": intermediate_size})
        self.down_proj = Linear(intermediate_size, {"down_proj": hidden_size})

    def forward(self, x: Tensor, adapters: LayerAdapters | None = None) -> Tensor:
        if adapters is not None:
            changing = adapters.of(self._gate_up, self._down)
            if changing.parts:
                return self._adapted(x, changing)
        return self._plain(x)

    def _plain(self, x: Tensor) -> Tensor:
        return self.gate_up_proj.weight.swiglu(x, self.down_proj.weight)

    def _adapted(self, x: Tensor, adapters: LayerAdapters) -> Tensor:
        """The rows of the base are computed with all others, as without adapters, unless there are none: a product may
        round a row by the number of all. The weights are then read twice."""
        rows, of_rows = adapters.rows, adapters.gathered()
        out = x.new_empty(x.shape) if len(rows) == adapters.num_rows else self._plain(x)
        chosen = x.index_select(0, rows)
        gate_up = self.gate_up_proj(chosen)  # [M, 2I]
        of_rows.add(self._gate_up, chosen, gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        inner = F.silu(gate) * up  # [M, I]
        down = self.down_proj(inner)
        of_rows.add(self._down, inner, down)
        return out.index_copy_(0, rows, down)

    def begin(self, x: Tensor, experts: Experts | None, adapters: LayerAdapters | None = None) -> Callable[[], Tensor]:
        """As `FeedForward.begin`, with nothing to wait for."""
        out: Tensor = self(x, adapters)
        return lambda: out
