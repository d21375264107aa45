"""Root mean square layer norm. Knows no model."""

import torch
from torch import Tensor, nn

from cluster.kernels.norm import add_and_norm


class RMSNorm(nn.Module):
    """Computed in float32, cast back, then the weight."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size))

    def forward(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """x, delta: [T, H]. Returns x + delta, or x where there is no delta, and that normed."""
        return add_and_norm(x, delta, self.weight, self.eps)
