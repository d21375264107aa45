"""Rotation and the way into the cache by the native kernel, every variant of this machine, bit for bit as torch's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_tools import bounded, each_variant

from cluster.kernels.native.library import DTYPES, Native
from cluster.kernels.rotary import Pair, rotate_to_cache_natively, rotate_to_cache_reference


def step(
    num_rows: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, seed: int
) -> tuple[torch.Tensor, Pair, torch.Tensor, torch.Tensor]:
    """qkv, cos and sin, a cache [2, blocks, 4, KV, D] of random numbers, and slots in any order. heads: Q, KV."""
    draw = torch.Generator().manual_seed(seed)
    num_heads, kv_heads = heads
    qkv = torch.randn(num_rows, (num_heads + 2 * kv_heads) * head_dim, generator=draw).to(dtype)
    cos, sin = torch.randn(2, num_rows, 1, head_dim, generator=draw).to(dtype)
    num_blocks = num_rows // 4 + 2
    cache = torch.randn(2, num_blocks, 4, kv_heads, head_dim, generator=draw).to(dtype)
    slots = torch.randperm(4 * num_blocks, generator=draw)[:num_rows]
    return qkv, (cos, sin), cache, slots


@each_variant
@pytest.mark.parametrize("dtype", list(DTYPES))
@settings(max_examples=50, deadline=None)
@given(
    num_rows=st.integers(0, 11),
    kv_heads=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 4, 7, 8]),
    half=st.one_of(st.integers(1, 20), st.sampled_from([32, 40, 48, 64, 70])),
    seed=st.integers(0, 1000),
    threads=st.integers(1, 3),
)
def test_it_rotates_and_writes_as_torch_does(
    native: Native, dtype: torch.dtype, num_rows: int, kv_heads: int, groups: int, half: int, seed: int, threads: int
) -> None:
    heads, head_dim = (kv_heads * groups, kv_heads), 2 * half
    qkv, rotary, cache, slots = step(num_rows, heads, head_dim, dtype, seed)
    expected_cache = cache.clone()
    expected = rotate_to_cache_reference(qkv, rotary, tuple(expected_cache), slots)

    guarded, check_qkv = bounded(tuple(qkv.shape), dtype)
    guarded.copy_(qkv)
    found_cache, check_cache = bounded(tuple(cache.shape), dtype)
    found_cache.copy_(cache)
    native.rotate_to_cache(
        DTYPES[dtype], DTYPES[dtype], guarded.data_ptr(), guarded.stride(0), rotary[0].data_ptr(), rotary[1].data_ptr(),
        slots.data_ptr(), found_cache[0].data_ptr(), found_cache[1].data_ptr(), *cache.stride()[2:4],
        num_rows, *heads, head_dim, threads,
    )  # fmt: skip
    check_qkv()
    check_cache()
    assert torch.equal(guarded[:, : heads[0] * head_dim].view(expected.shape), expected)
    assert torch.equal(found_cache, expected_cache), "the other slots too"
    assert torch.equal(guarded[:, heads[0] * head_dim :], qkv[:, heads[0] * head_dim :])

    assert torch.equal(rotate_to_cache_natively(native, qkv, rotary, tuple(cache), slots), expected)
    assert torch.equal(cache, expected_cache)


@each_variant
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_a_token_that_is_not_finite_reaches_no_other(native: Native, dtype: torch.dtype) -> None:
    qkv, rotary, cache, slots = step(9, (4, 2), 20, dtype, 3)
    qkv[4, 3::7] = torch.nan
    qkv[4, 1::7] = torch.inf
    expected_cache = cache.clone()
    expected = rotate_to_cache_reference(qkv.clone(), rotary, tuple(expected_cache), slots)
    found = rotate_to_cache_natively(native, qkv, rotary, tuple(cache), slots)
    torch.testing.assert_close(found, expected, atol=0, rtol=0, equal_nan=True)
    torch.testing.assert_close(cache, expected_cache, atol=0, rtol=0, equal_nan=True)
    assert found[torch.arange(9) != 4].isfinite().all()


def test_the_rotation_of_numbers_worked_out_by_hand() -> None:
    """A quarter turn takes (3, 5) to (-5, 3). A head of size 2: the query, the key, the value."""
    qkv = torch.tensor([[3.0, 5.0, 1.0, 2.0, 7.0, 8.0]])
    rotary = torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
    cache = torch.zeros(2, 2, 2, 1, 2)
    q = rotate_to_cache_reference(qkv, rotary, tuple(cache), torch.tensor([2]))
    assert q.flatten().tolist() == [-5, 3]
    assert cache[0].flatten().tolist() == [0, 0, 0, 0, -2, 1, 0, 0]
    assert cache[1].flatten().tolist() == [0, 0, 0, 0, 7, 8, 0, 0]
