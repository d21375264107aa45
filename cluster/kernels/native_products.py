"""Products by the native kernels on tensors: memory, threads and pointers for `kernels/native/`.

M, T: rows, N: outputs, K: inputs, S: experts a row, L: experts, H: hidden size, I: intermediate size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cluster.kernels.native.library import DTYPES, Native

# A second thread is woken for 0.05 ms or more (`cluster/model/layers/linear.py`). In that time one thread reads a
# megabyte of weights, or multiplies two million pairs.
BYTES_A_THREAD, PAIRS_A_THREAD = 1 << 20, 1 << 21


def threads_for(num_bytes: int, num_pairs: int) -> int:
    """Threads that a product is worth: bytes of its weights, and how many pairs of numbers it multiplies."""
    worth = 1 + max(num_bytes // BYTES_A_THREAD, num_pairs // PAIRS_A_THREAD)
    return min(torch.get_num_threads(), worth)


def linear(native: Native, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """As F.linear. x: [M, K], matrix: [N, K], bias: [N], all of one dtype of `DTYPES`. Returns [M, N]."""
    x, (num_rows, num_inputs) = in_rows(x), x.shape
    num_outputs = matrix.shape[0]
    fits = x.dtype == matrix.dtype and matrix.shape[1] == num_inputs and matrix.stride(1) == 1
    _check(fits and _is_bias(bias, x.dtype, num_outputs), "a linear layer", x)
    dtype = DTYPES[x.dtype]
    out = x.new_empty(num_rows, num_outputs)
    scratch = _memory(native.linear_scratch(dtype, num_rows, num_inputs))
    native.linear(
        dtype, x.data_ptr(), x.stride(0), matrix.data_ptr(), matrix.stride(0),
        None if bias is None else bias.data_ptr(), out.data_ptr(), num_outputs,
        num_rows, num_outputs, num_inputs, scratch.data_ptr(),
        threads_for(matrix.nbytes, num_rows * num_outputs * num_inputs),
    )  # fmt: skip
    return out


def linear_quantized(native: Native, x: Tensor, rows: Tensor, bias: Tensor | None, form: int) -> Tensor:
    """As `linear`, of a matrix in 8 or 4 bits. rows: [N, bytes] uint8, of a `RowLayout` of this form."""
    x, (num_rows, num_inputs) = in_rows(x), x.shape
    num_outputs = rows.shape[0]
    _check(rows.stride(1) == 1 and _is_bias(bias, x.dtype, num_outputs), "a linear layer", x)
    dtype = DTYPES[x.dtype]
    out = x.new_empty(num_rows, num_outputs)
    scratch = _memory(native.quantized_scratch(dtype, form, num_rows, num_inputs))
    native.linear_quantized(
        dtype, form, x.data_ptr(), x.stride(0), rows.data_ptr(), rows.stride(0),
        None if bias is None else bias.data_ptr(), out.data_ptr(), num_outputs,
        num_rows, num_outputs, num_inputs, scratch.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


class ExpertPointers:
    """Where the experts' matrices lie, in the kernel's order. They must be contiguous, and live as long as this.

    form: of `RowLayout` where they are rows of bytes, [2I, …] and [H, …]; 0 for matrices.
    intermediate_size: I, which these do not tell.
    """

    def __init__(
        self, gate_up: Sequence[Tensor], down: Sequence[Tensor], *, form: int = 0, intermediate_size: int = 0
    ) -> None:
        assert all(matrix.is_contiguous() for matrix in (*gate_up, *down))
        self.hidden_size, width = down[0].shape if down else (0, 0)
        self.form, self.intermediate_size = form, intermediate_size if form else width
        self.row_bytes = (gate_up[0].shape[1], width) if down else (0, 0)
        self.gate_up, self.down = (torch.tensor([m.data_ptr() for m in side]) for side in (gate_up, down))
        self.dtype = down[0].dtype if down and not form else None
        self._matrices = gate_up, down

    def __len__(self) -> int:
        return len(self.gate_up)


def experts(native: Native, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, weights: ExpertPointers) -> Tensor:
    """As `experts_reference`: each row with its experts, the weighted sums in the order of their ids.

    x: [T, H]; topk_ids: [T, S] int64, negative where another shard computes; topk_weights: [T, S] float32.
    Returns [T, H] float32.
    """
    x, topk_ids, topk_weights = in_rows(x), topk_ids.contiguous(), topk_weights.contiguous()
    num_rows, num_slots = topk_ids.shape
    fits = x.shape == (num_rows, weights.hidden_size) and weights.dtype in (x.dtype, None)
    fits = fits and topk_weights.shape == topk_ids.shape
    _check(fits and topk_ids.dtype == torch.int64 and topk_weights.dtype == torch.float32, "experts", x)
    dtype, num_experts = DTYPES[x.dtype], len(weights)
    hidden_size, intermediate_size = weights.hidden_size, weights.intermediate_size
    sizes = num_rows, num_slots, num_experts, hidden_size, intermediate_size
    out = torch.empty(num_rows, hidden_size, dtype=torch.float32, device="cpu")
    if weights.form:
        num_bytes = native.experts_quantized_scratch(dtype, weights.form, *sizes)
    else:
        num_bytes = native.experts_scratch(dtype, *sizes)
    scratch = _memory(num_bytes)
    rows = x.data_ptr(), x.stride(0), topk_ids.data_ptr(), topk_weights.data_ptr(), num_rows, num_slots
    gate_up, down = weights.gate_up.data_ptr(), weights.down.data_ptr()
    rest = num_experts, hidden_size, intermediate_size, out.data_ptr(), scratch.data_ptr(), torch.get_num_threads()
    if weights.form:
        up_bytes, down_bytes = weights.row_bytes
        native.experts_quantized(dtype, weights.form, *rows, gate_up, up_bytes, down, down_bytes, *rest)
    else:
        native.experts(dtype, *rows, gate_up, down, *rest)
    return out


def swiglu(native: Native, x: Tensor, weights: ExpertPointers) -> Tensor:
    """silu(x · gate) * (x · up), times down: one expert that takes all rows.

    x: [T, H], weights: of that expert. Returns [T, H] in x's dtype.
    """
    num_rows = x.shape[0]
    ids = torch.zeros(num_rows, 1, dtype=torch.int64, device="cpu")
    ones = torch.ones(num_rows, 1, dtype=torch.float32, device="cpu")
    return experts(native, x, ids, ones, weights).to(x.dtype)


def choose(native: Native, logits: Tensor, num_chosen: int, *, normalize: bool) -> tuple[Tensor, Tensor]:
    """As `router.choose`: topk_ids [T, S] int64 and topk_weights [T, S] float32. logits: [T, E]."""
    logits = logits.contiguous()
    num_rows, num_experts = logits.shape
    ids = torch.empty(num_rows, num_chosen, dtype=torch.int64, device="cpu")
    weights = torch.empty(num_rows, num_chosen, dtype=torch.float32, device="cpu")
    threads = threads_for(0, num_rows * num_experts * 64)  # an exponential and `num_chosen` looks for each
    scratch = _memory(threads * num_experts * torch.float32.itemsize)
    native.route(
        DTYPES[logits.dtype], logits.data_ptr(), num_rows, num_experts, num_chosen, normalize,
        ids.data_ptr(), weights.data_ptr(), scratch.data_ptr(), threads,
    )  # fmt: skip
    return ids, weights


def _check(fits: bool, what: str, x: Tensor) -> None:
    """Raises ValueError unless they fit: a kernel would read past a row."""
    if not fits:
        raise ValueError(f"rows of {tuple(x.shape)} in {x.dtype} do not fit the weights of {what}")


def _is_bias(bias: Tensor | None, dtype: torch.dtype, num_outputs: int) -> bool:
    return bias is None or (bias.dtype == dtype and bias.shape == (num_outputs,) and bias.is_contiguous())


def _memory(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device="cpu")


def in_rows(x: Tensor) -> Tensor:
    """x, each of its rows in one piece."""
    return x if x.stride(-1) == 1 else x.contiguous()
