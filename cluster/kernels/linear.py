"""Products with one weight matrix. On the CPU a bfloat16 weight is packed once, in the order in which it is read.

Packed weights are read at 24 GB/s for 1 row and 10 GB/s for 32, plain ones at 15 and 7.6 (2816 x 2048, 40 of them in
turn, 2 threads of a Zen 4; BENCHMARKS.md). float32 stays plain: it is the dtype in which answers are compared.
M: rows, N: outputs, K: inputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Fewer rows take longer: 0.65, 0.75 and 0.50 ms for 1, 2 and 3, 0.48 for 4 (2816 x 2048, 1 thread of a Zen 4).
MIN_ROWS = 4


def packs(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether weights of this dtype gain from being packed here."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return False
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class PackedWeight:
    """[N, K] bfloat16 in oneDNN's own layout, as large as it was. The plain tensor is no longer needed."""

    def __init__(self, weight: Tensor) -> None:
        self.shape = weight.shape
        self.nbytes = weight.nbytes
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """As F.linear. x: [M, K] bfloat16. Returns [M, N]."""
        num_rows = x.shape[0]
        if num_rows < MIN_ROWS:
            x = torch.cat((x, x[:1].expand(MIN_ROWS - num_rows, -1)))
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")
        return out[:num_rows]


Weight = Tensor | PackedWeight


def linear(x: Tensor, weight: Weight) -> Tensor:
    """F.linear without a bias, with a weight of either kind."""
    return weight.product(x) if isinstance(weight, PackedWeight) else F.linear(x, weight)


class PackedLinear(nn.Module):
    """Takes the place of one nn.Linear whose weight is loaded, or of several with the same input.

    One product for several is faster than one each: starting two threads costs 0.06 to 0.16 ms a product.
    """

    def __init__(self, *plain: nn.Module) -> None:
        super().__init__()
        with torch.no_grad():
            linears = [p for p in plain if isinstance(p, nn.Linear)]
            weights: list[Tensor] = [p.weight for p in linears]
            biases: list[Tensor] = [p.bias for p in linears if p.bias is not None]
            self.packed = PackedWeight(weights[0] if len(plain) == 1 else torch.cat(weights))
            self.bias = torch.cat(biases) if biases else None
        self.sizes = [p.out_features for p in linears]

    def forward(self, x: Tensor) -> Tensor:
        """[M, K] -> [M, sum of the outputs], in the order of the plain ones."""
        return self.packed.product(x, self.bias)


def pack_linears(module: nn.Module) -> None:
    """Packs every nn.Linear below a module in place, one after another: twice the memory of one, not of all.

    A module with a method `pack` does it itself: it knows which of its linears have the same input.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, PackedLinear(child))
        elif callable(pack := getattr(child, "pack", None)):
            pack()
        else:
            pack_linears(child)
