"""A layer's small steps between its products, in one launch each, against torch's own operations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_tools import DEVICE, DTYPES, gpu_kernels

from cluster.kernels.paged import write_kv
from cluster.kernels.rotary import apply_rotary

fused = gpu_kernels("fused")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def random_of(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hidden"), [(1, 64), (5, 100), (3, 2048)])
def test_the_norm_is_the_one_written_out(dtype, rows, hidden):
    x, weight = random_of(1, rows, hidden, dtype=dtype), random_of(2, hidden, dtype=dtype)
    y = x.double()
    expected = y * torch.rsqrt(y.pow(2).mean(dim=-1, keepdim=True) + 1e-6) * weight.double()
    got = fused.rms_norm(x, weight, 1e-6)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(2, 2, 16), (6, 2, 8), (4, 1, 80)])
def test_queries_are_rotated_and_keys_and_values_written(dtype, heads, kv_heads, head_dim):
    qkv = random_of(3, 5, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    angles = random_of(4, 5, head_dim // 2).repeat(1, 2).unsqueeze(1)
    rotary = angles.cos().to(dtype), angles.sin().to(dtype)
    slots = torch.tensor([9, 3, 0, 7, 4], device=DEVICE)
    caches = list(random_of(5, 2, 3, 4, kv_heads, head_dim, dtype=dtype))
    expected = [cache.double() for cache in caches]
    q, k, v = (
        part.view(5, -1, head_dim).double()
        for part in qkv.split([n * head_dim for n in (heads, kv_heads, kv_heads)], dim=1)
    )
    exact = [part.double() for part in rotary]
    write_kv(*expected, apply_rotary(k, *exact), v, slots)
    got = fused.rotate_and_write(qkv, rotary, tuple(caches), slots)
    limits = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(got.double(), apply_rotary(q, *exact), **limits)
    for cache, other in zip(caches, expected, strict=True):
        torch.testing.assert_close(cache.double(), other, **limits)


@pytest.mark.parametrize("normalized", [False, True])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), experts=st.sampled_from([4, 60, 64]), topk=st.integers(1, 4))
def test_the_router_takes_the_best_of_the_softmax(normalized, seed, experts, topk):
    logits = random_of(seed, 3, experts)
    expected, ids = logits.double().softmax(dim=-1).topk(topk)
    if normalized:
        expected = expected / expected.sum(dim=-1, keepdim=True)
    got_ids, got = fused.route(logits, topk, normalized=normalized)
    assert torch.equal(got_ids, ids)
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-5)


def test_the_router_has_an_expert_for_a_row_without_numbers():
    logits = torch.full((2, 60), torch.nan, device=DEVICE)
    logits[1, :] = 1.0
    ids, weights = fused.route(logits, 4, normalized=False)
    assert ((ids >= 0) & (ids < 60)).all()
    assert ids[1].tolist() == [0, 1, 2, 3], "the first of equals"
    assert weights[1].tolist() == pytest.approx([1 / 60] * 4)


def test_pairs_find_their_expert_here_and_are_counted():
    ids = torch.tensor([[3, -1], [0, 3], [2, 1]], device=DEVICE)
    counts = torch.tensor([5, 0, 0, 1], device=DEVICE)
    local = fused.localize(ids, torch.tensor([1, -1, -1, 0], device=DEVICE), counts)
    assert local.tolist() == [[0, -1], [1, 0], [-1, -1]]
    assert counts.tolist() == [6, 1, 1, 3]
