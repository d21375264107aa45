"""The GPU's kernels for experts against the weighted sum of single ones."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_tools import DEVICE, DTYPES, gpu_kernels

from cluster.kernels.experts import experts_reference

experts = gpu_kernels("experts")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
EXAMPLES = 10 if DEVICE.type == "cuda" else 6


def drawn(seed, num_tokens, num_local, top_k, hidden, width, dtype):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, hidden, generator=random).to(dtype)
    ids = torch.randint(-1, num_local, (num_tokens, top_k), generator=random)
    weights = torch.rand(num_tokens, top_k, generator=random)
    gate_up = torch.randn(num_local, 2 * width, hidden, generator=random).div(hidden**0.5).to(dtype)
    down = torch.randn(num_local, hidden, width, generator=random).div(width**0.5).to(dtype)
    return x, ids, weights, gate_up, down


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=EXAMPLES, deadline=None)
@given(
    seed=st.integers(0, 2**31), num_tokens=st.integers(1, 9) | st.just(45), num_local=st.integers(1, 4),
    top_k=st.integers(1, 4), hidden=st.sampled_from([16, 40, 130]), width=st.sampled_from([8, 40]),
)  # fmt: skip
def test_few_rows_are_the_weighted_sum_of_single_experts(dtype, seed, num_tokens, num_local, top_k, hidden, width):
    """Some slots have no expert here, some experts no row, some more rows than a tile takes."""
    x, ids, weights, gate_up, down = drawn(seed, num_tokens, num_local, top_k, hidden, width, dtype)
    expected = experts_reference(x.double(), ids, weights, gate_up.double(), down.double())
    got = experts.experts_of_few_rows(*(tensor.to(DEVICE) for tensor in (x, ids, weights, gate_up, down)))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.cpu(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_and_up_are_joined_and_pairs_are_added_where_they_lie(dtype):
    random = torch.Generator().manual_seed(2)
    gate_up = torch.randn(7, 2 * 40, generator=random).to(dtype)
    expected = F.silu(gate_up[:, :40].double()) * gate_up[:, 40:].double()
    got = experts.silu_mul(gate_up.to(DEVICE)).cpu().double()
    torch.testing.assert_close(got, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    ids = torch.tensor([[0, -1], [2, 1], [-1, -1]])
    outer = torch.randn(6, 40, generator=random).to(dtype)
    outer[4] = torch.nan  # the place of a pair that is computed elsewhere
    places = torch.tensor([5, 4, 0, 1, 4, 4])
    weights = torch.tensor([[0.5, 9.0], [2.0, 3.0], [9.0, 9.0]])
    expected = torch.stack([0.5 * outer[5].float(), 2 * outer[0].float() + 3 * outer[1].float(), torch.zeros(40)])
    got = experts.combine(*(tensor.to(DEVICE) for tensor in (outer, ids, weights, places))).cpu()
    torch.testing.assert_close(got, expected)
