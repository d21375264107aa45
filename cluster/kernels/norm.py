"""Root mean square layer norm after an addition: its definition, and the kernels for CPU and GPU.

T: tokens, H: hidden size.
"""

import torch
from torch import Tensor

from cluster.kernels import gpu
from cluster.kernels.native.library import DTYPES, Native, native
from cluster.kernels.native_products import in_rows, threads_for


def add_and_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `add_and_norm_reference`, by a kernel where there is one."""
    if gpu.runs_on(x):
        from cluster.kernels.gpu.fused import rms_norm

        x = x if delta is None else x + delta
        return x, rms_norm(x, weight, eps)
    kernels = native() if x.device.type == "cpu" else None
    fits = x.dtype == weight.dtype and weight.is_contiguous()
    fits = fits and (delta is None or (delta.shape == x.shape and delta.dtype == x.dtype))
    if kernels is None or x.dtype not in DTYPES or not fits:
        return add_and_norm_reference(x, delta, weight, eps)
    return add_and_norm_natively(kernels, x, delta, weight, eps)


def add_and_norm_reference(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + delta, and that normed: in float32, cast back, then the weight. x, delta: [T, H]; weight: [H]."""
    if delta is not None:
        x = x + delta
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(dim=-1, keepdim=True) + eps)
    return x, weight * y.to(x.dtype)


def add_and_norm_natively(
    native: Native, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """In one call. It rounds where the reference does; only the mean is summed in another order."""
    x = in_rows(x)
    delta = None if delta is None else in_rows(delta)
    num_rows, hidden_size = x.shape
    total = x if delta is None else torch.empty(x.shape, dtype=x.dtype, device="cpu")
    normed = torch.empty(x.shape, dtype=x.dtype, device="cpu")
    native.rms_norm(
        DTYPES[x.dtype], x.data_ptr(), x.stride(0),
        None if delta is None else delta.data_ptr(), 0 if delta is None else delta.stride(0), weight.data_ptr(),
        None if delta is None else total.data_ptr(), normed.data_ptr(), num_rows, hidden_size, eps,
        threads_for(0, 32 * x.numel()),
    )  # fmt: skip
    return total, normed
