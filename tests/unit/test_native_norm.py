"""The native norm, every variant of this machine beside its definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_tools import bounded, each_variant

from cluster.kernels.native.library import DTYPES, Native
from cluster.kernels.norm import add_and_norm_natively, add_and_norm_reference

EPS = 1e-6
# The mean is summed in another order; in 16 bits that moves a number near a tie, and what the weight makes of it.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}


def norm(
    native: Native, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, threads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As add_and_norm_reference, into memory with guards."""
    total, check_total = bounded(tuple(x.shape), x.dtype)
    normed, check_normed = bounded(tuple(x.shape), x.dtype)
    native.rms_norm(
        DTYPES[x.dtype], x.data_ptr(), x.stride(0), None if delta is None else delta.data_ptr(),
        0 if delta is None else delta.stride(0), weight.data_ptr(), None if delta is None else total.data_ptr(),
        normed.data_ptr(), *x.shape, EPS, threads,
    )  # fmt: skip
    check_total()
    check_normed()
    return x if delta is None else total, normed


@each_variant
@pytest.mark.parametrize("dtype", list(DTYPES))
@settings(max_examples=50, deadline=None)
@given(
    num_rows=st.integers(0, 11),
    hidden_size=st.one_of(st.integers(1, 70), st.sampled_from([128, 1000, 2048])),
    with_delta=st.booleans(),
    scale=st.sampled_from([1e-4, 1.0, 100.0]),
    seed=st.integers(0, 1000),
    threads=st.integers(1, 3),
)
def test_it_is_the_norm_written_out(
    native: Native, dtype: torch.dtype, num_rows: int, hidden_size: int, with_delta: bool, scale: float, seed: int,
    threads: int,
) -> None:  # fmt: skip
    draw = torch.Generator().manual_seed(seed)
    wide = torch.randn(2, num_rows, hidden_size + 3, generator=draw).mul(scale).to(dtype)
    x, delta = wide[0, :, :hidden_size], wide[1, :, :hidden_size] if with_delta else None  # with strides of their own
    weight = torch.randn(hidden_size, generator=draw).to(dtype)
    expected_sum, expected = add_and_norm_reference(x, delta, weight, EPS)
    total, normed = norm(native, x, delta, weight, threads)
    assert torch.equal(total, expected_sum)
    torch.testing.assert_close(normed, expected, atol=2**-23, rtol=ROUNDING[dtype])
    again = add_and_norm_natively(native, x, delta, weight, EPS)
    assert torch.equal(again[0], total)
    assert torch.equal(again[1], normed)


@each_variant
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("wild", [torch.nan, torch.inf, 6e4])
def test_a_row_that_is_not_finite_reaches_no_other(native: Native, dtype: torch.dtype, wild: float) -> None:
    """Two numbers of 60000 add up to infinity in float16."""
    draw = torch.Generator().manual_seed(1)
    x, delta = torch.randn(2, 9, 100, generator=draw).to(dtype)
    weight = torch.randn(100, generator=draw).to(dtype)
    sound = norm(native, x, delta, weight, 1)
    x[4, 70] = delta[4, 70] = wild
    total, normed = norm(native, x, delta, weight, 2)
    others = torch.arange(9) != 4
    assert torch.equal(total[others], sound[0][others])
    assert torch.equal(normed[others], sound[1][others])
    expected = add_and_norm_reference(x, delta, weight, EPS)
    assert torch.equal(total[4].isfinite(), expected[0][4].isfinite())
    assert torch.equal(normed[4].isnan(), expected[1][4].isnan())


@each_variant
def test_the_norm_of_numbers_worked_out_by_hand(native: Native) -> None:
    """(3, 4) and (1, 0) make (4, 4), whose mean square is 16: (1, 1) times the weight."""
    x, delta, weight = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([2.0, -1.0])
    total, normed = norm(native, x, delta, weight, 1)
    assert total.tolist() == [[4, 4]]
    assert normed.flatten().tolist() == pytest.approx([2, -1])
