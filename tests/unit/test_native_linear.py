"""Products of the native kernels, every variant of this machine beside float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_tools import bounded, each_variant

from cluster.kernels.native.library import DTYPES, Native


def linear(native: Native, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, threads: int) -> torch.Tensor:
    """As F.linear, into memory with a guard behind it."""
    (m, k), n = x.shape, w.shape[0]
    out, check = bounded((m, n), x.dtype)
    scratch, check_scratch = bounded((native.linear_scratch(DTYPES[x.dtype], m, k),), torch.uint8)
    native.linear(
        DTYPES[x.dtype], x.data_ptr(), x.stride(0), w.data_ptr(), w.stride(0),
        None if bias is None else bias.data_ptr(), out.data_ptr(), n, m, n, k, scratch.data_ptr(), threads,
    )  # fmt: skip
    check()
    check_scratch()
    return out


@each_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=40, deadline=None)
@given(
    m=st.sampled_from([1, 2, 3, 5, 6, 7, 8, 13, 16, 17, 32, 48, 49, 97, 100]),
    n=st.integers(1, 140),
    k=st.integers(1, 200) | st.sampled_from([32, 64, 160]),  # tiles take multiples of 32
    with_bias=st.booleans(),
    seed=st.integers(0, 1000),
    threads=st.integers(1, 3),
)
def test_products_are_those_of_float64(
    native: Native, dtype: torch.dtype, m: int, n: int, k: int, with_bias: bool, seed: int, threads: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    x, w, bias = (torch.randn(*shape, generator=draw).to(dtype) for shape in ((m, k + 3), (n, k + 5), (n,)))
    x, w = x[:, :k], w[:, :k]  # with strides of their own
    found = linear(native, x, w, bias if with_bias else None, threads)
    exact = x.double() @ w.double().T + (bias.double() if with_bias else 0)
    rounding = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    size = x.double().abs() @ w.double().abs().T + 1
    assert ((found.double() - exact).abs() <= rounding * exact.abs() + (k + 8) * 2**-23 * size).all()


@each_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [96, 100])
def test_a_row_is_the_same_number_in_every_batch(native: Native, dtype: torch.dtype, k: int) -> None:
    draw = torch.Generator().manual_seed(5)
    x, w = (torch.randn(*shape, generator=draw).to(dtype) for shape in ((130, k), (75, k)))
    whole = linear(native, x, w, None, 2)
    for rows in (slice(0, 1), slice(3, 5), slice(7, 20), slice(40, 89), slice(2, 130)):
        assert torch.equal(linear(native, x[rows], w, None, 1), whole[rows])


@each_variant
@pytest.mark.parametrize("m", [257, 520])
@pytest.mark.parametrize("k", [160, 4160])  # of these 128 rows stay in a core's cache
def test_many_rows_are_multiplied_in_groups(native: Native, m: int, k: int) -> None:
    draw = torch.Generator().manual_seed(6)
    x, w = (torch.randn(*shape, generator=draw).to(torch.bfloat16) for shape in ((m, k), (150, k)))
    found, exact = linear(native, x, w, None, 3), x.double() @ w.double().T
    size = x.double().abs() @ w.double().abs().T
    assert ((found.double() - exact).abs() <= 2**-8 * exact.abs() + (k + 8) * 2**-23 * size).all()
    assert torch.equal(linear(native, x[250:257], w, None, 1), found[250:257])


@each_variant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_odd_numbers_round_as_torch_rounds(native: Native, dtype: torch.dtype) -> None:
    """Ties, infinities, NaN, the largest and the smallest numbers: a product with one is the number itself."""
    if dtype == torch.float16:
        bits = torch.arange(-(2**15), 2**15, 7).to(torch.int16).view(torch.float16)
        x = torch.cat([bits, bits.new_tensor([0.0, -0.0, 6e-8, 65504, torch.inf, -torch.inf, torch.nan])])
    else:
        x = torch.arange(-(2**15), 2**15, 7).to(torch.int16).view(torch.bfloat16)
        smallest = torch.finfo(torch.bfloat16).smallest_normal
        x = x[(x.abs() >= smallest) | x.isnan()]  # dpbf16 takes numbers below it as zero
    one = torch.ones(1, 1, dtype=dtype)
    found = linear(native, x.unsqueeze(1), one, None, 1).squeeze(1)
    assert torch.equal(found.nan_to_num(nan=123.0), x.nan_to_num(nan=123.0))
    assert torch.equal(found.isnan(), x.isnan())
