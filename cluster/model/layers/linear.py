"""Linear layers on weights of any form. Knows no model.

M: rows, N: outputs, K: inputs.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cluster.kernels.weights import MakeWeight, Parts, Weight


class Linear(nn.Module):
    """Takes the place of one `nn.Linear`, or of several with the same input, whose outputs stand side by side.

    One product for several is faster than one each: starting two threads costs 0.06 to 0.16 ms a product.
    outputs: each one's name in the checkpoint, beside this module's, and its number of outputs.
    """

    weight: Weight
    bias: Tensor | None

    def __init__(self, num_inputs: int, outputs: Mapping[str, int], *, bias: bool = False) -> None:
        super().__init__()
        self.num_inputs = num_inputs
        self.outputs = dict(outputs)
        self.has_bias = bias

    def allocate(self, make_weight: MakeWeight, *, dtype: torch.dtype, device: torch.device) -> None:
        """Makes weight and bias, not filled."""
        num_outputs = sum(self.outputs.values())
        self.weight = make_weight(num_outputs, self.num_inputs)
        self.bias = torch.empty(num_outputs, dtype=dtype, device=device) if self.has_bias else None

    def parts(self, prefix: str) -> Parts:
        """Of the weight. prefix: of the names beside this module's, with its dot."""
        return {f"{prefix}{name}": size for name, size in self.outputs.items()}

    def bias_targets(self, prefix: str) -> dict[str, Tensor]:
        """Where the checkpoint's biases are to be read."""
        if self.bias is None:
            return {}
        biases = torch.split(self.bias, list(self.outputs.values()))
        return {f"{prefix}{name}.bias": bias for name, bias in zip(self.outputs, biases, strict=True)}

    def forward(self, x: Tensor) -> Tensor:
        """[M, K] -> [M, N]."""
        return self.weight.product(x, self.bias)
