"""The native kernels over keys and values in 8 bits, every variant of this machine beside the plain definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_tools import bounded, each_variant
from test_cache_rows import each_form, meant, stored
from test_native_attention import ROUNDING, Shape, assert_one_answer, attention, decode, exact, few, paged
from test_native_rope import step

from cluster.kernels.attention import make_attention
from cluster.kernels.cache_rows import LARGEST, row_width
from cluster.kernels.grouped_attention import GroupedAttention
from cluster.kernels.native.library import CACHE_DTYPES, DTYPES, Native
from cluster.kernels.native_attention import NativeAttention
from cluster.kernels.rotary import rotate_to_cache, rotate_to_cache_natively, rotate_to_cache_reference

shapes = st.builds(
    Shape,
    block_size=st.sampled_from([1, 3, 4, 16, 300]),
    kv_heads=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 4, 7, 8]),
    head_dim=st.sampled_from([2, 6, 16, 34, 64, 80, 96, 128, 160]),
)


@each_variant
@settings(max_examples=15, deadline=None)
@given(
    form=st.sampled_from(list(LARGEST)),
    dtype=st.sampled_from(list(ROUNDING)),
    lengths=st.one_of(st.lists(decode, max_size=5), st.lists(few, max_size=4)),
    shape=shapes,
    window=st.sampled_from([None, None, 1, 3, 40, 256, 300]),
    seed=st.integers(0, 1000),
    threads=st.integers(1, 3),
)
def test_it_is_attention_over_the_numbers_that_are_meant(
    native: Native, form: torch.dtype, dtype: torch.dtype, lengths: list[tuple[int, int]], shape: Shape,
    window: int | None, seed: int, threads: int,
) -> None:  # fmt: skip
    """All that is no sequence's token is NaN."""
    q, cache, batch = paged(lengths, shape, dtype, seed, torch.nan)
    rows = stored(cache, form)
    found = attention(native, q, rows, batch, window=window, threads=threads).float()
    expected = exact(q, meant(rows), batch, window)
    torch.testing.assert_close(found, expected, atol=ROUNDING[dtype], rtol=ROUNDING[dtype])


@each_variant
@each_form
@pytest.mark.parametrize("window", [None, 300])
def test_a_query_has_one_answer_in_every_batch(native: Native, form: torch.dtype, window: int | None) -> None:
    lengths = [(3, 700), (1, 0), (1, 300), (4, 2000)]
    q, cache, batch = paged(lengths, Shape(16, 4, 2, 64), torch.bfloat16, 7, torch.nan)
    rows = stored(cache, form)
    assert_one_answer(native, q, rows, batch, window=window)


@each_variant
@each_form
def test_a_token_that_is_not_finite_is_seen_by_later_ones_alone(native: Native, form: torch.dtype) -> None:
    q, cache, batch = paged([(6, 700)], Shape(4, 2, 2, 40), torch.float32, 3, 0.0)
    sound = attention(native, q, stored(cache, form), batch, window=None, threads=2)
    cache.flatten(1, 2)[:, int(batch.block_tables[0, 702 // 4]) * 4 + 702 % 4, :, 7] = torch.inf
    rows = stored(cache, form)
    found = attention(native, q, rows, batch, window=None, threads=2)
    assert torch.equal(found[:2], sound[:2])
    assert found[2:].isnan().all()
    found = attention(native, q, rows, batch, window=2, threads=2)
    assert found[[0, 1, 4, 5]].isfinite().all()
    assert found[2:4].isnan().all()


@each_variant
@each_form
def test_a_mixed_batch_is_shared_out_between_both(native: Native, form: torch.dtype) -> None:
    q, cache, batch = paged([(1, 20), (9, 4), (2, 9), (40, 0)], Shape(4, 2, 2, 16), torch.float32, 1, torch.nan)
    cache[:, batch.padding_block] = 0
    rows = stored(cache, form)
    grouped = GroupedAttention(block_size=4, num_kv_heads=2, row_bytes=2 * 18 * 4)
    for window in (None, 5):
        found = NativeAttention(native, grouped).plan(batch).attend(q, *rows, scale=0.3, window=window)
        torch.testing.assert_close(found, exact(q, meant(rows), batch, window))


@each_variant
@settings(max_examples=25, deadline=None)
@given(
    form=st.sampled_from(list(LARGEST)),
    dtype=st.sampled_from(list(DTYPES)),
    num_rows=st.integers(0, 11),
    heads=st.sampled_from([(1, 1), (4, 2), (7, 1), (3, 3)]),
    half=st.one_of(st.integers(1, 20), st.sampled_from([32, 40, 64])),
    power=st.sampled_from([0.0, 0.0, -130.0, -126.0, -20.0, 6.0, 100.0]),
    wild=st.sampled_from([None, None, torch.nan, torch.inf]),
    seed=st.integers(0, 1000),
    threads=st.integers(1, 3),
)
def test_it_rotates_and_writes_the_bytes_of_the_definition(
    native: Native, form: torch.dtype, dtype: torch.dtype, num_rows: int, heads: tuple[int, int], half: int,
    power: float, wild: float | None, seed: int, threads: int,
) -> None:  # fmt: skip
    head_dim = 2 * half
    qkv, rotary, cache, slots = step(num_rows, heads, head_dim, dtype, seed)
    qkv = (qkv.double() * 2.0**power).to(dtype)
    if wild is not None and num_rows:
        qkv[0, 1 :: head_dim + 1] = wild
    expected_cache, expected_qkv = stored(cache, form), qkv.clone()
    shape = tuple(expected_cache.shape)
    found_cache, check = bounded(shape, form)
    found_cache.view(torch.int8).copy_(expected_cache.view(torch.int8))
    expected = rotate_to_cache_reference(expected_qkv, rotary, tuple(expected_cache), slots)
    native.rotate_to_cache(
        DTYPES[dtype], CACHE_DTYPES[form], qkv.data_ptr(), qkv.stride(0), rotary[0].data_ptr(), rotary[1].data_ptr(),
        slots.data_ptr(), found_cache[0].data_ptr(), found_cache[1].data_ptr(), *found_cache.stride()[2:4],
        num_rows, *heads, head_dim, threads,
    )  # fmt: skip
    check()
    queries = qkv[:, : heads[0] * head_dim].view(expected.shape)
    torch.testing.assert_close(queries, expected, atol=0, rtol=0, equal_nan=True)
    assert torch.equal(found_cache.view(torch.int8), expected_cache.view(torch.int8)), "the other slots too"


@each_variant
@each_form
def test_a_layer_takes_the_kernels_for_a_cache_in_8_bits(native: Native, form: torch.dtype) -> None:
    qkv, rotary, cache, slots = step(5, (4, 2), 8, torch.bfloat16, 3)
    caches = [stored(cache, form) for _ in range(3)]
    expected = rotate_to_cache_reference(qkv.clone(), rotary, tuple(caches[0]), slots)
    assert torch.equal(rotate_to_cache(qkv.clone(), rotary, tuple(caches[1]), slots), expected)
    assert torch.equal(rotate_to_cache_natively(native, qkv.clone(), rotary, tuple(caches[2]), slots), expected)
    for found in caches[1:]:
        assert torch.equal(found.view(torch.int8), caches[0].view(torch.int8))
    layer = torch.zeros(3, 4, 2, row_width(8, form), dtype=torch.int8).view(form)
    assert isinstance(make_attention(layer, 4), NativeAttention)
