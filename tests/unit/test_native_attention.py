"""Attention of the native kernels over a paged cache, every variant of this machine beside its definition."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_tools import bounded, each_variant

from cluster.kernels.attention import make_attention
from cluster.kernels.grouped_attention import GroupedAttention
from cluster.kernels.native.library import CACHE_DTYPES, DTYPES, Native
from cluster.kernels.native_attention import NativeAttention
from cluster.kernels.paged import PagedBatch, attention_reference

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
MANY = 1 << 20  # new tokens of a sequence: none is left to another kernel


@dataclasses.dataclass(frozen=True)
class Shape:
    """block_size: S, kv_heads: KV, groups: Q / KV, head_dim: D."""

    block_size: int
    kv_heads: int
    groups: int
    head_dim: int


def paged(
    lengths: list[tuple[int, int]], shape: Shape, dtype: torch.dtype, seed: int, foreign: float
) -> tuple[torch.Tensor, torch.Tensor, PagedBatch]:
    """q, a cache [2, blocks, S, KV, D] and the batch. lengths: new tokens and older ones of each sequence.

    All that is no sequence's token holds `foreign`: other blocks, the tails of last blocks, the padding block.
    """
    random = torch.Generator().manual_seed(seed)
    context_lens = [new + old for new, old in lengths]
    widths = [-(-length // shape.block_size) for length in context_lens]
    order = torch.randperm(sum(widths) + 2, generator=random)
    tables = torch.full((len(lengths), max(widths, default=0)), int(order[-1]))
    cache = torch.full((2, len(order), shape.block_size, shape.kv_heads, shape.head_dim), foreign).to(dtype)
    first = 0
    for row, (width, length) in enumerate(zip(widths, context_lens, strict=True)):
        tables[row, :width] = order[first : first + width]
        places = torch.arange(length)
        slots = tables[row, places // shape.block_size] * shape.block_size + places % shape.block_size
        tokens = torch.randn(2, length, *cache.shape[3:], generator=random).to(dtype)
        cache.flatten(1, 2)[:, slots] = tokens
        first += width
    rows = sum(new for new, _ in lengths)
    q = torch.randn(rows, shape.kv_heads * shape.groups, shape.head_dim, generator=random).to(dtype)
    batch = PagedBatch(
        query_lens=[new for new, _ in lengths], context_lens=context_lens, block_tables=tables,
        slot_mapping=torch.zeros(rows, dtype=torch.int64), context_lens_tensor=torch.tensor(context_lens),
        padding_block=int(order[-1]),
    )  # fmt: skip
    return q, cache, batch


def attention(
    native: Native, q: torch.Tensor, cache: torch.Tensor, batch: PagedBatch, *,
    window: int | None, threads: int, most_queries: int = MANY,
) -> torch.Tensor:  # fmt: skip
    """As attention_reference, scale 0.3; a row that the kernel leaves keeps its 0xFF."""
    _, num_heads, head_dim = q.shape
    block_size, kv_heads = cache.shape[2:4]
    out, check = bounded(tuple(q.shape), q.dtype)
    query_lens, tables = torch.tensor(batch.query_lens, dtype=torch.int64), batch.block_tables
    most_queries = min(most_queries, max(batch.query_lens, default=0))
    lens = query_lens.data_ptr(), batch.context_lens_tensor.data_ptr(), len(query_lens), most_queries
    dtype, stored = DTYPES[q.dtype], CACHE_DTYPES[cache.dtype]
    num_bytes = native.attention_scratch(stored, *lens, num_heads, head_dim, threads)
    scratch, check_scratch = bounded((num_bytes,), torch.uint8)
    native.attention(
        dtype, stored, q.data_ptr(), q.stride(0), cache[0].data_ptr(), cache[1].data_ptr(), *cache.stride()[1:4],
        tables.data_ptr(), tables.stride(0), *lens, num_heads, kv_heads, head_dim, block_size, 0.3, window or 0,
        out.data_ptr(), out.stride(0), scratch.data_ptr(), threads,
    )  # fmt: skip
    check()
    check_scratch()
    return out


def assert_one_answer(
    native: Native, q: torch.Tensor, cache: torch.Tensor, batch: PagedBatch, *, window: int | None
) -> None:
    """Each query's is the same to the bit on any number of threads, and alone."""
    whole = attention(native, q, cache, batch, window=window, threads=1)
    assert torch.equal(attention(native, q, cache, batch, window=window, threads=3), whole)
    row = 0
    for i, (new, length) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
        for seen in range(length - new + 1, length + 1):
            alone = dataclasses.replace(
                batch, query_lens=[1], context_lens=[seen], block_tables=batch.block_tables[i : i + 1],
                context_lens_tensor=torch.tensor([seen]),
            )  # fmt: skip
            found = attention(native, q[row : row + 1], cache, alone, window=window, threads=2)
            assert torch.equal(found, whole[row : row + 1])
            row += 1


def exact(q: torch.Tensor, cache: torch.Tensor, batch: PagedBatch, window: int | None) -> torch.Tensor:
    """The definition, in float32 throughout."""
    return attention_reference(q.float(), cache[0].float(), cache[1].float(), batch, scale=0.3, window=window)


shapes = st.builds(
    Shape,
    block_size=st.sampled_from([1, 3, 4, 16, 32, 300]),
    kv_heads=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 4, 7, 8]),
    head_dim=st.sampled_from([1, 7, 16, 33, 64, 80, 96, 128, 160]),
)
# New tokens and older ones: decode, with contexts about a piece of the kernel and two, and a few tokens at once.
decode = st.tuples(st.just(1), st.one_of(st.integers(0, 40), st.sampled_from([254, 255, 256, 257, 511, 512, 700])))
few = st.tuples(st.integers(1, 5), st.one_of(st.integers(0, 40), st.sampled_from([250, 253, 255, 256, 510])))


@each_variant
@pytest.mark.parametrize("dtype", list(ROUNDING))
@settings(max_examples=40, deadline=None)
@given(
    lengths=st.one_of(st.lists(decode, max_size=5), st.lists(few, max_size=4)),
    shape=shapes,
    window=st.sampled_from([None, None, 1, 3, 40, 256, 300]),
    foreign=st.sampled_from([torch.nan, torch.inf, 3e38]),
    seed=st.integers(0, 1000),
    threads=st.integers(1, 3),
)
def test_it_is_attention_written_out(
    native: Native, dtype: torch.dtype, lengths: list[tuple[int, int]], shape: Shape, window: int | None,
    foreign: float, seed: int, threads: int,
) -> None:  # fmt: skip
    q, cache, batch = paged(lengths, shape, dtype, seed, foreign)
    found = attention(native, q, cache, batch, window=window, threads=threads).float()
    torch.testing.assert_close(found, exact(q, cache, batch, window), atol=ROUNDING[dtype], rtol=ROUNDING[dtype])


@each_variant
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("window", [None, 300])
def test_a_query_has_one_answer_in_every_batch(native: Native, dtype: torch.dtype, window: int | None) -> None:
    """Alone, beside others, on any number of threads, and as the last of several new tokens."""
    lengths = [(3, 700), (1, 0), (1, 300), (2, 255), (4, 2000)]
    q, cache, batch = paged(lengths, Shape(16, 4, 2, 64), dtype, 7, torch.nan)
    assert_one_answer(native, q, cache, batch, window=window)


@each_variant
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("wild", [torch.nan, torch.inf, -torch.inf])
def test_a_token_that_is_not_finite_is_seen_by_later_ones_alone(
    native: Native, dtype: torch.dtype, wild: float
) -> None:
    q, cache, batch = paged([(6, 700)], Shape(4, 2, 2, 40), dtype, 3, 0.0)
    sound = attention(native, q, cache, batch, window=None, threads=2)
    slot = int(batch.block_tables[0, 702 // 4]) * 4 + 702 % 4
    cache.flatten(1, 2)[:, slot] = wild
    found = attention(native, q, cache, batch, window=None, threads=2)
    assert torch.equal(found[:2], sound[:2])
    assert not found[2:].isfinite().any(dim=-1).all()
    found = attention(native, q, cache, batch, window=2, threads=2)
    assert found[[0, 1, 4, 5]].isfinite().all()
    assert not found[2:4].isfinite().any()


@each_variant
def test_keys_of_minus_infinity_have_no_weight(native: Native) -> None:
    """A piece whose scores are all minus infinity adds nothing; a query that has no other score gets NaN, as softmax
    gives it."""
    shape = Shape(16, 1, 1, 32)
    q, cache, batch = paged([(1, 599)], shape, torch.float32, 3, 0.0)
    q.fill_(1)
    slots = batch.block_tables[0, :16].repeat_interleave(16) * 16 + torch.arange(256) % 16
    cache[0].flatten(0, 1)[slots] = -torch.inf
    expected = exact(q, cache, batch, None)
    assert expected.isfinite().all()
    torch.testing.assert_close(attention(native, q, cache, batch, window=None, threads=1), expected)
    cache[0].fill_(-torch.inf)
    assert attention(native, q, cache, batch, window=None, threads=1).isnan().all()


@each_variant
def test_values_near_the_largest_number_do_not_overflow(native: Native) -> None:
    q, cache, batch = paged([(1, 599)], Shape(16, 1, 1, 32), torch.float32, 3, 0.0)
    cache[0].zero_()
    cache[1].fill_(3e38)
    found = attention(native, q, cache, batch, window=None, threads=1)
    torch.testing.assert_close(found, torch.full_like(found, 3e38))


@each_variant
def test_longer_sequences_are_left_to_the_other_kernel(native: Native) -> None:
    lengths = [(1, 20), (9, 4), (2, 9), (5, 0), (1, 300)]
    q, cache, batch = paged(lengths, Shape(16, 2, 2, 16), torch.float32, 1, torch.nan)
    found = attention(native, q, cache, batch, window=None, threads=2, most_queries=2)
    left = torch.tensor([False] + [True] * 9 + [False] * 2 + [True] * 5 + [False])
    expected = exact(q, cache, batch, None)
    torch.testing.assert_close(found[~left], expected[~left])
    assert (found[left].view(torch.uint8) == 0xFF).all(), "those rows are not the kernel's"


@each_variant
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 40)), min_size=1, max_size=6),
    window=st.sampled_from([None, 1, 5]),
    seed=st.integers(0, 1000),
)
def test_a_mixed_batch_is_shared_out_between_both(
    native: Native, lengths: list[tuple[int, int]], window: int | None, seed: int
) -> None:
    """q is a part of a larger product, as a layer has it."""
    shape = Shape(4, 2, 2, 16)
    q, cache, batch = paged(lengths, shape, torch.float32, seed, torch.nan)
    cache[:, batch.padding_block] = 0
    wide = torch.cat((q.flatten(1), torch.full((len(q), 5), torch.nan)), dim=1)
    part = wide[:, : shape.kv_heads * shape.groups * 16].view(q.shape)
    grouped = GroupedAttention(block_size=4, num_kv_heads=2, row_bytes=2 * 16 * 4)
    found = NativeAttention(native, grouped).plan(batch).attend(part, *cache, scale=0.3, window=window)
    torch.testing.assert_close(found, exact(q, cache, batch, window))


def test_torch_computes_where_no_kernel_takes_the_cache(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert isinstance(make_attention(torch.zeros(2, 4, 1, 8, dtype=torch.float64), 1), GroupedAttention)
    assert "torch.float64" in caplog.text
