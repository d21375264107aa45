"""Products by the native kernels on tensors: memory, threads and pointers for `kernels/native/`.

M, T: rows, N: outputs, K: inputs, S: experts a row, L: experts, H: hidden size, I: intermediate size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cluster.kernels.native.library import DTYPES, Native


def linear(native: Native, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """As F.linear. x: [M, K], matrix: [N, K], bias: [N], all of one dtype of `DTYPES`. Returns [M, N]."""
    x = _in_rows(x)
    (num_rows, num_inputs), num_outputs = x.shape, matrix.shape[0]
    dtype = DTYPES[x.dtype]
    out = x.new_empty(num_rows, num_outputs)
    scratch = torch.empty(native.linear_scratch(dtype, num_rows, num_inputs), dtype=torch.uint8)
    native.linear(
        dtype, x.data_ptr(), x.stride(0), matrix.data_ptr(), matrix.stride(0),
        None if bias is None else bias.data_ptr(), out.data_ptr(), num_outputs,
        num_rows, num_outputs, num_inputs, scratch.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


class ExpertPointers:
    """Where the experts' matrices lie, in the kernel's order. They must be contiguous, and live as long as this."""

    def __init__(self, gate_up: Sequence[Tensor], down: Sequence[Tensor]) -> None:
        assert all(matrix.is_contiguous() for matrix in (*gate_up, *down))
        self.hidden_size, self.intermediate_size = down[0].shape if down else (0, 0)
        self.gate_up, self.down = (torch.tensor([m.data_ptr() for m in side]) for side in (gate_up, down))
        self._matrices = gate_up, down

    def __len__(self) -> int:
        return len(self.gate_up)


def experts(native: Native, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, weights: ExpertPointers) -> Tensor:
    """As `experts_reference`: each row with its experts, the weighted sums in the order of their ids.

    x: [T, H]; topk_ids: [T, S] int64, negative where another shard computes; topk_weights: [T, S] float32.
    Returns [T, H] float32.
    """
    x, topk_ids, topk_weights = _in_rows(x), topk_ids.contiguous(), topk_weights.contiguous()
    num_rows, num_slots = topk_ids.shape
    dtype, num_experts = DTYPES[x.dtype], len(weights)
    sizes = weights.hidden_size, weights.intermediate_size
    out = torch.empty(num_rows, weights.hidden_size, dtype=torch.float32)
    num_bytes = native.experts_scratch(dtype, num_rows, num_slots, num_experts, *sizes)
    scratch = torch.empty(num_bytes, dtype=torch.uint8)
    native.experts(
        dtype, x.data_ptr(), x.stride(0), topk_ids.data_ptr(), topk_weights.data_ptr(), num_rows, num_slots,
        weights.gate_up.data_ptr(), weights.down.data_ptr(), num_experts, *sizes,
        out.data_ptr(), scratch.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def swiglu(native: Native, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """silu(x · gate) * (x · up), times down: one expert that takes all rows.

    x: [T, H], gate_up: [2I, H], gate above up, down: [H, I]. Returns [T, H] in x's dtype.
    """
    num_rows = x.shape[0]
    ids, weights = torch.zeros(num_rows, 1, dtype=torch.int64), torch.ones(num_rows, 1)
    return experts(native, x, ids, weights, ExpertPointers([gate_up], [down])).to(x.dtype)


def _in_rows(x: Tensor) -> Tensor:
    """x, each of its rows in one piece."""
    return x if x.stride(-1) == 1 else x.contiguous()
