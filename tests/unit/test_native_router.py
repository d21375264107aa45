"""The gate's choice by the native kernel, every variant of this machine beside torch's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_tools import each_variant

from cluster.kernels import native_products
from cluster.kernels.native.library import Native
from cluster.kernels.router import choose


@each_variant
@settings(max_examples=40, deadline=None)
@given(
    num_rows=st.sampled_from([1, 2, 17, 300]),
    num_experts=st.integers(1, 130),
    num_chosen=st.integers(1, 8),
    normalize=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([0.01, 1.0, 60.0]),
    seed=st.integers(0, 1000),
)
def test_weights_and_experts_are_those_of_torch(
    native: Native, num_rows, num_experts, num_chosen, normalize, dtype, scale, seed
) -> None:
    num_chosen = min(num_chosen, num_experts)
    random = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(num_rows, num_experts, generator=random)).to(dtype)
    ids, weights = native_products.choose(native, logits, num_chosen, normalize=normalize)
    _, wanted = choose(logits.double(), num_chosen, normalize=normalize)
    torch.testing.assert_close(weights, wanted.float(), rtol=2e-6, atol=1e-12)
    assert all(len(set(row)) == num_chosen for row in ids.tolist())
    probs = logits.double().softmax(dim=-1)
    torch.testing.assert_close(probs.gather(1, ids), probs.topk(num_chosen).values, rtol=2e-6, atol=1e-30)


@each_variant
def test_of_equal_experts_the_first_are_chosen(native: Native) -> None:
    ids, weights = native_products.choose(native, torch.zeros(3, 60), 4, normalize=False)
    assert ids.tolist() == [[0, 1, 2, 3]] * 3
    torch.testing.assert_close(weights, torch.full((3, 4), 1 / 60))


@each_variant
@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_a_row_without_probabilities_still_has_experts(native: Native, odd: float) -> None:
    logits = torch.zeros(3, 9)
    logits[1, 5] = odd
    ids, weights = native_products.choose(native, logits, 4, normalize=True)
    assert ids[1].tolist() == [0, 1, 2, 3]
    assert weights[1].isnan().all()
    assert weights[[0, 2]].eq(0.25).all()
