"""torch's attention of sequences together: a number that is not finite reaches those that see it, and no others.

torch's fused attention for CPUs gives zeros for some queries whose scores are NaN or infinite.
"""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_native_attention import Shape, exact, paged

from cluster.kernels.grouped_attention import GroupedAttention

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}
SHAPE = Shape(block_size=4, kv_heads=2, groups=2, head_dim=8)
WILD = [torch.nan, torch.inf, -torch.inf]
prefills = st.lists(st.tuples(st.sampled_from([1, 2, 3, 9, 40]), st.integers(0, 40)), min_size=1, max_size=3)
decodes = st.lists(st.tuples(st.just(1), st.integers(0, 70)), min_size=1, max_size=3)


@pytest.mark.parametrize("dtype", list(ROUNDING))
@settings(max_examples=100, deadline=None)
@given(
    lengths=st.one_of(prefills, decodes), window=st.sampled_from([None, None, 1, 5, 30]), seed=st.integers(0, 1 << 30),
    kind=st.sampled_from(["query", "key", "value", "key and value"]), value=st.sampled_from(WILD), alone=st.booleans(),
)  # fmt: skip
def test_a_number_that_is_not_finite_reaches_the_queries_that_see_it(dtype, lengths, window, seed, kind, value, alone):
    """alone: one number of a row, so that scores are infinite and not NaN; else the row. Other sequences keep every
    bit."""
    q, cache, batch = paged(lengths, SHAPE, dtype, seed, 0.0)
    plan = GroupedAttention(block_size=4, num_kv_heads=2, row_bytes=2 * 8 * dtype.itemsize).plan(batch)
    sound = plan.attend(q, *cache, scale=0.3, window=window)
    choose = random.Random(seed)
    sequence = choose.randrange(len(lengths))
    new, old = lengths[sequence]
    first = sum(n for n, _ in lengths[:sequence])
    token, row = choose.randrange(new + old), first + choose.randrange(new)
    block = batch.block_tables[sequence, token // 4]
    numbers = slice(2, 3) if alone else slice(None)
    if kind == "query":
        q[row, :, numbers] = value
    for name, tokens in zip(("key", "value"), cache, strict=True):
        if name in kind:
            tokens[block, token % 4, :, numbers] = value
    expected = exact(q, cache, batch, window)
    found = plan.attend(q, *cache, scale=0.3, window=window)
    finite = expected.isfinite().all(dim=-1)
    assert torch.equal(found.isfinite().all(dim=-1), finite)
    torch.testing.assert_close(found[finite].float(), expected[finite], atol=ROUNDING[dtype], rtol=ROUNDING[dtype])
    others = torch.ones(len(q), dtype=torch.bool)
    others[first : first + new] = False
    assert torch.equal(found[others], sound[others])
