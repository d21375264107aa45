"""Attention of long sequences, a piece of keys at a time: against the definition, and in memory that stays."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.kernels.grouped_attention import GroupedAttention
from cluster.kernels.long_attention import LongSequence
from cluster.kernels.paged import PagedBatch, attention_reference

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def paged(draw, context, block_size, num_kv_heads, head_dim, dtype):
    """Caches and a shuffled table; the last block is the padding block."""
    num_blocks = -(-context // block_size)
    shape = num_blocks + 4, block_size, num_kv_heads, head_dim
    k, v = (torch.randn(shape, generator=draw).to(dtype) for _ in range(2))
    return k, v, torch.randperm(num_blocks + 3, generator=draw)[:num_blocks]


def batch_of(table, num_queries, context, padding_block):
    return PagedBatch(
        query_lens=[num_queries], context_lens=[context], block_tables=table[None],
        slot_mapping=torch.zeros(num_queries, dtype=torch.int64), context_lens_tensor=torch.tensor([context]),
        padding_block=padding_block,
    )  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 1 << 30), context=st.integers(1, 60), block_size=st.sampled_from([1, 3, 4, 16]),
    window=st.sampled_from([None, 1, 3, 7, 20, 100]), dtype=st.sampled_from(list(DTYPES)),
    max_keys=st.sampled_from([1, 5, 9, 64]), max_queries=st.sampled_from([1, 4, 7, 64]),
    poisons=st.sampled_from(["none", "both", "key", "value"]),
)  # fmt: skip
def test_it_is_the_definition_and_nan_reaches_only_those_that_see_it(
    seed, context, block_size, window, dtype, max_keys, max_queries, poisons
):
    """A poisoned token has NaN or infinity in its key, in its value, or in both, as a hidden state that is NaN gives
    them; all that is no token of the sequence has it in both."""
    draw, choose = torch.Generator().manual_seed(seed), random.Random(seed)
    kv_heads, groups, head_dim = choose.choice([1, 2, 3]), choose.choice([1, 2]), choose.choice([4, 8, 16])
    k, v, table = paged(draw, context, block_size, kv_heads, head_dim, dtype)
    num_queries = choose.randint(1, context)
    q = torch.randn(num_queries, kv_heads * groups, head_dim, generator=draw).to(dtype)
    if poisons != "none":
        places = torch.arange(context)
        others = torch.ones(k.shape[:2], dtype=torch.bool)
        others[table[places // block_size], places % block_size] = False
        token = choose.randrange(context)
        value = choose.choice([torch.nan, torch.inf, -torch.inf])
        k[others] = v[others] = value
        for kind, cache in (("key", k), ("value", v)):
            if poisons in (kind, "both"):
                cache[table[token // block_size], token % block_size] = value
    expected = attention_reference(q, k, v, batch_of(table, num_queries, context, len(k) - 1), scale=0.3, window=window)
    sequence = LongSequence(
        query_rows=torch.arange(num_queries), context=context, table=table, block_size=block_size, max_keys=max_keys,
        max_queries=max_queries,
    )  # fmt: skip
    found = sequence.attend(q, k, v, scale=0.3, window=window)
    finite = expected.isfinite().all(dim=-1)
    assert torch.equal(found.isfinite().all(dim=-1), finite)
    tolerance = DTYPES[dtype]
    torch.testing.assert_close(found[finite], expected[finite], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("window", [None, 3000])
def test_a_long_sequence_beside_short_ones_is_the_definition(window):
    """The last 2,100 of 9,000 tokens: 19 million pairs, too many for one mask; 700 and 5 new tokens beside it."""
    draw = torch.Generator().manual_seed(5)
    contexts, queries = [800, 9000, 5], [700, 2100, 5]
    tables = torch.full((3, -(-9000 // 16)), 700)
    free = torch.randperm(700, generator=draw)
    for row, context in enumerate(contexts):
        width = -(-context // 16)
        tables[row, :width], free = free[:width], free[width:]
    k, v = (torch.randn(701, 16, 1, 8, generator=draw) for _ in range(2))
    k[700] = v[700] = 0
    q = torch.randn(sum(queries), 2, 8, generator=draw)
    batch = PagedBatch(
        query_lens=queries, context_lens=contexts, block_tables=tables,
        slot_mapping=torch.zeros(sum(queries), dtype=torch.int64), context_lens_tensor=torch.tensor(contexts),
        padding_block=700,
    )  # fmt: skip
    plan = GroupedAttention(block_size=16, num_kv_heads=1, row_bytes=32).plan(batch)
    assert [type(group) for group in plan.groups].count(LongSequence) == 1
    found = plan.attend(q, k, v, scale=0.3, window=window)
    rows = [0, 699, 700, 701, 1500, 2799, 2800, 2804]
    expected = torch.cat([exact(q, k, v, batch, row, window) for row in rows])
    torch.testing.assert_close(found[rows], expected, atol=2e-6, rtol=1e-5)


def exact(q, k, v, batch, row, window):
    """One row in float64."""
    starts = [0, 700, 2800]
    i = max(n for n, start in enumerate(starts) if start <= row)
    position = batch.context_lens[i] - batch.query_lens[i] + row - starts[i]
    first = 0 if window is None else max(0, position + 1 - window)
    keys, values = (x[batch.block_tables[i]].flatten(0, 1)[first : position + 1, 0].double() for x in (k, v))
    probs = (q[row].double() @ keys.T * 0.3).softmax(dim=-1)
    return (probs @ values).float()[None]
