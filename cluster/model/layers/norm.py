"""Root mean square layer norm. Knows no model."""

import torch
from torch import Tensor, nn

from cluster.kernels import gpu


class RMSNorm(nn.Module):
    """Computed in float32, cast back, then the weight."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        if gpu.runs_on(x):
            from cluster.kernels.gpu.fused import rms_norm

            return rms_norm(x, self.weight, self.eps)
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)
