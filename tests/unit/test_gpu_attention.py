"""The GPU's attention over the paged cache against attention written out, poison in whatever it must not read."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_tools import DEVICE, DTYPES, gpu_kernels

from cluster.kernels.paged import PagedBatch, attention_reference

attention = gpu_kernels("attention")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
EXAMPLES = 10 if DEVICE.type == "cuda" else 6


def step(lengths, *, block_size, kv_heads, groups, head_dim, dtype, seed, poison=math.nan):
    """q, the caches and the batch: sequences of so many new and old tokens. All else in the caches is poison."""
    random = torch.Generator().manual_seed(seed)
    context_lens = [new + old for new, old in lengths]
    widths = [-(-length // block_size) for length in context_lens]
    num_blocks = sum(widths) + 2
    blocks = torch.randperm(num_blocks - 1, generator=random).tolist()
    tables = torch.full((len(lengths), max(widths)), num_blocks - 1)
    cache = torch.full((2, num_blocks, block_size, kv_heads, head_dim), poison)
    slots = []
    for row, (width, (new, old)) in enumerate(zip(widths, lengths, strict=True)):
        tables[row, :width] = torch.tensor(rows := [blocks.pop() for _ in range(width)])
        for i in range(new + old):
            cache[:, rows[i // block_size], i % block_size] = torch.randn(2, kv_heads, head_dim, generator=random)
        slots += [rows[i // block_size] * block_size + i % block_size for i in range(old, old + new)]
    q = torch.randn(sum(new for new, _ in lengths), groups * kv_heads, head_dim, generator=random)
    batch = PagedBatch(
        query_lens=[new for new, _ in lengths], context_lens=context_lens, block_tables=tables.to(DEVICE),
        slot_mapping=torch.tensor(slots).to(DEVICE), context_lens_tensor=torch.tensor(context_lens).to(DEVICE),
        padding_block=num_blocks - 1,
    )  # fmt: skip
    return q.to(dtype).to(DEVICE), *cache.to(dtype).to(DEVICE), batch


def attend(q, k, v, batch, window):
    plan = attention.PagedAttention(q.shape[1] // k.shape[2]).plan(batch)
    return plan.attend(q, k, v, scale=0.3, window=window)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=EXAMPLES, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.tuples(st.sampled_from([1, 1, 2, 9, 70]), st.integers(0, 30)), min_size=1, max_size=4),
    groups=st.sampled_from([1, 2, 7]), window=st.sampled_from([None, 1, 3, 20]), head_dim=st.sampled_from([8, 16, 80]),
    block_size=st.sampled_from([4, 16]),
)  # fmt: skip
def test_it_is_attention_written_out_whatever_stands_elsewhere(
    dtype, seed, lengths, groups, window, head_dim, block_size
):
    q, k, v, batch = step(
        lengths, block_size=block_size, kv_heads=2, groups=groups, head_dim=head_dim, dtype=dtype, seed=seed
    )
    expected = attention_reference(q, k, v, batch, scale=0.3, window=window)
    assert expected.isfinite().all()
    torch.testing.assert_close(attend(q, k, v, batch, window), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("window", [None, 100, 300])
def test_long_contexts_are_taken_in_chunks(window):
    """Contexts at and around the ends of chunks of 256 keys."""
    lengths = [(1, 255), (1, 256), (1, 600), (1, 0), (3, 511)]
    q, k, v, batch = step(lengths, block_size=16, kv_heads=1, groups=2, head_dim=16, dtype=torch.float32, seed=3)
    expected = attention_reference(q, k, v, batch, scale=0.3, window=window)
    torch.testing.assert_close(attend(q, k, v, batch, window), expected, atol=1e-4, rtol=1e-4)


def test_a_sequence_gets_the_same_bits_whatever_stands_beside_it():
    lengths = [(1, 300), (1, 2000), (5, 17)]
    q, k, v, batch = step(lengths, block_size=16, kv_heads=2, groups=2, head_dim=16, dtype=torch.float16, seed=4)
    together, row = attend(q, k, v, batch, None), 0
    for i, (new, old) in enumerate(lengths):
        alone = PagedBatch(
            query_lens=[new], context_lens=[new + old], block_tables=batch.block_tables[i : i + 1].contiguous(),
            slot_mapping=batch.slot_mapping[row : row + new], context_lens_tensor=batch.context_lens_tensor[i : i + 1],
            padding_block=batch.padding_block,
        )  # fmt: skip
        assert torch.equal(attend(q[row : row + new], k, v, alone, None), together[row : row + new])
        row += new


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["key", "value"])
def test_a_tokens_nan_reaches_no_token_before_it(kind, value):
    """Token 5 of 9 is bad: the first five answers are what they are without it, from there on none is finite."""
    q, k, v, batch = step([(9, 0)], block_size=4, kv_heads=1, groups=2, head_dim=16, dtype=torch.float32, seed=5)
    expected = attend(q, k, v, batch, None)
    bad = k if kind == "key" else v
    bad.view(-1, 1, 16)[batch.slot_mapping[5]] = value
    got = attend(q, k, v, batch, None)
    torch.testing.assert_close(got[:5], expected[:5])
    assert not got[5:].isfinite().all(dim=-1).any()
