"""Fast paths against their plain references, on random shapes."""

from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from attention_tools import paged_attention
from hypothesis import given, settings
from hypothesis import strategies as st
from weight_tools import filled, packed, plain

from cluster.kernels.experts import experts_by_grouped_mm, experts_by_loop, experts_reference
from cluster.kernels.paged import PagedBatch, attention_reference, write_kv
from cluster.kernels.varlen_attention import VarlenAttention
from cluster.kernels.weights import PlainWeight, packs

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2}
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


def loop_over_plain(x, ids, weights, gate_up, down):
    return experts_by_loop(x, ids, weights, [plain(w) for w in gate_up], [plain(w) for w in down])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("product", [loop_over_plain, experts_by_grouped_mm])
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31), num_tokens=st.integers(1, 9), num_local=st.integers(1, 6), top_k=st.integers(1, 4),
    dtype=st.sampled_from(list(TOLERANCE)),
)  # fmt: skip
def test_grouped_experts_are_the_weighted_sum_of_single_ones(
    device, product, seed, num_tokens, num_local, top_k, dtype
):
    """Ids go from -1 (computed elsewhere), so some rows have no expert here and some experts no row."""
    random = torch.Generator().manual_seed(seed)
    hidden, width = 16, 8
    x = torch.randn(num_tokens, hidden, generator=random).to(dtype)
    ids = torch.randint(-1, num_local, (num_tokens, top_k), generator=random)
    weights = torch.rand(num_tokens, top_k, generator=random)
    gate_up = torch.randn(num_local, 2 * width, hidden, generator=random).div(4).to(dtype)
    down = torch.randn(num_local, hidden, width, generator=random).div(4).to(dtype)
    expected = experts_reference(x.double(), ids, weights, gate_up.double(), down.double())
    got = product(*(tensor.to(device) for tensor in (x, ids, weights, gate_up, down)))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.cpu(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


class SteppedWeight(PlainWeight):
    """Wants rows in steps of 16."""

    seen: ClassVar[set[int]] = set()

    def padded(self, num_rows):
        return -(-num_rows // 16) * 16

    def product(self, x, bias=None):
        self.seen.add(x.shape[0])
        return super().product(x, bias)


@pytest.mark.parametrize("num_tokens", [1, 31, 200])
def test_experts_are_given_as_many_rows_as_their_products_want(num_tokens):
    """Rows of others stand in, behind the last expert's any; they change no sum."""
    random = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, 16, generator=random)
    ids = torch.randint(-1, 5, (num_tokens, 3), generator=random)
    weights = torch.rand(num_tokens, 3, generator=random)
    gate_up, down = torch.randn(5, 16, 16, generator=random), torch.randn(5, 16, 8, generator=random)
    stepped = [[filled(SteppedWeight(torch.empty_like(w)), w) for w in side] for side in (gate_up, down)]
    SteppedWeight.seen.clear()
    got = experts_by_loop(x, ids, weights, *stepped)
    assert SteppedWeight.seen
    assert all(num_rows % 16 == 0 for num_rows in SteppedWeight.seen)
    expected = experts_reference(x.double(), ids, weights, gate_up.double(), down.double())
    torch.testing.assert_close(got, expected.float(), atol=1e-4, rtol=1e-4)


needs_packing = pytest.mark.skipif(
    not packs(torch.bfloat16, torch.device("cpu")), reason="this CPU's oneDNN has no bfloat16 products"
)


@needs_packing
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 70), outputs=st.integers(1, 90), inputs=st.integers(1, 90))
def test_a_packed_weight_gives_the_product_of_the_plain_one(seed, rows, outputs, inputs):
    random = torch.Generator().manual_seed(seed)
    weight, bias = (
        torch.randn(*shape, generator=random).div(8).bfloat16() for shape in ((outputs, inputs), (outputs,))
    )
    x = torch.randn(rows, inputs, generator=random).bfloat16()
    with torch.inference_mode():
        expected = F.linear(x.double(), weight.double(), bias.double())
        got = packed(weight).product(x, bias)
    torch.testing.assert_close(got.double(), expected, atol=2e-2, rtol=2e-2)


@needs_packing
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), num_tokens=st.integers(1, 40), top_k=st.integers(1, 4))
def test_packed_experts_are_the_weighted_sum_of_single_ones(seed, num_tokens, top_k):
    random = torch.Generator().manual_seed(seed)
    num_local, hidden, width = 5, 64, 48
    x = torch.randn(num_tokens, hidden, generator=random).bfloat16()
    ids = torch.randint(-1, num_local, (num_tokens, top_k), generator=random)
    weights = torch.rand(num_tokens, top_k, generator=random)
    gate_up = torch.randn(num_local, 2 * width, hidden, generator=random).div(8).bfloat16()
    down = torch.randn(num_local, hidden, width, generator=random).div(8).bfloat16()
    expected = experts_reference(x.double(), ids, weights, gate_up.double(), down.double())
    with torch.inference_mode():
        got = experts_by_loop(x, ids, weights, [packed(w) for w in gate_up], [packed(w) for w in down])
    torch.testing.assert_close(got, expected, atol=6e-2, rtol=6e-2)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 12)), min_size=1, max_size=5),
    groups=st.sampled_from([1, 2, 4]),
    window=st.sampled_from([None, 1, 3, 8]),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_paged_attention_is_attention_written_out(device, seed, lengths, groups, window, dtype):
    """Each sequence brings 1 to 6 new tokens on 0 to 12 in the cache; blocks of 4 lie anywhere."""
    random = torch.Generator().manual_seed(seed)
    block_size, kv_heads, head_dim = 4, 2, 8
    context_lens = [new + old for new, old in lengths]
    widths = [-(-length // block_size) for length in context_lens]
    blocks = torch.randperm(sum(widths), generator=random).tolist()
    tables = torch.zeros(len(lengths), max(widths), dtype=torch.int64)
    slots = []
    for row, (width, (new, old)) in enumerate(zip(widths, lengths, strict=True)):
        row_blocks = [blocks.pop() for _ in range(width)]
        tables[row, :width] = torch.tensor(row_blocks)
        slots += [row_blocks[i // block_size] * block_size + i % block_size for i in range(old, old + new)]
    cache = torch.randn(2, sum(widths), block_size, kv_heads, head_dim, generator=random).to(dtype).to(device)
    total = sum(new for new, _ in lengths)
    q = torch.randn(total, groups * kv_heads, head_dim, generator=random).to(dtype).to(device)
    k, v = torch.randn(2, total, kv_heads, head_dim, generator=random).to(dtype).to(device)
    batch = PagedBatch(
        query_lens=[new for new, _ in lengths],
        context_lens=context_lens,
        block_tables=tables.to(device),
        slot_mapping=torch.tensor(slots).to(device),
        context_lens_tensor=torch.tensor(context_lens).to(device),
        padding_block=0,
    )
    write_kv(cache[0], cache[1], k, v, batch.slot_mapping)
    assert torch.equal(cache[0].flatten(0, 1)[batch.slot_mapping], k)
    expected = attention_reference(q, cache[0], cache[1], batch, scale=0.3, window=window)
    got = paged_attention(q, cache[0], cache[1], batch, scale=0.3, window=window)
    torch.testing.assert_close(got.float(), expected.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def varlen_on_the_cpu(
    q,
    k,
    v,
    cu_queries,
    cu_keys,
    max_q,
    max_k,
    *,
    scale,
    window_size,
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
):  # fmt: skip
    """varlen_attn as torch documents it, one sequence at a time; causal, aligned to the end of the keys."""
    assert window_size[1] == 0
    out = torch.empty_like(q)
    for i, (start, stop) in enumerate(zip(cu_queries.tolist(), cu_queries.tolist()[1:], strict=False)):
        if block_table is None:
            keys, values = (x[cu_keys[i] : cu_keys[i + 1]] for x in (k, v))
        else:
            keys, values = (x[block_table[i]].flatten(0, 1)[: seqused_k[i]] for x in (k, v))
        assert len(keys) <= max_k
        assert stop - start <= max_q
        queries = torch.arange(len(keys) - (stop - start), len(keys)).unsqueeze(1)
        columns = torch.arange(len(keys)).unsqueeze(0)
        visible = columns <= queries
        if window_size[0] >= 0:
            visible &= columns >= queries - window_size[0]
        keys, values, rows = (x.transpose(0, 1) for x in (keys, values, q[start:stop]))
        part = F.scaled_dot_product_attention(rows, keys, values, attn_mask=visible, scale=scale, enable_gqa=enable_gqa)
        out[start:stop] = part.transpose(0, 1)
    return out


@pytest.mark.parametrize("reads_blocks", [True, False])
@pytest.mark.parametrize("window", [None, 3])
def test_the_gpus_attention_is_told_where_everything_lies(window, reads_blocks):
    """The call of flash attention, checked against a plain writing-out of what torch says it does."""
    random = torch.Generator().manual_seed(5)
    cache = torch.randn(2, 6, 4, 2, 8, generator=random)
    batch = PagedBatch(
        query_lens=[3, 1], context_lens=[7, 9], block_tables=torch.tensor([[4, 1, 0], [2, 5, 3]]),
        slot_mapping=torch.zeros(4, dtype=torch.int64), context_lens_tensor=torch.tensor([7, 9]), padding_block=0,
    )  # fmt: skip

    def varlen(*args, **options):
        if "block_table" in options and not reads_blocks:
            raise TypeError("got an unexpected keyword argument 'block_table'")
        return varlen_on_the_cpu(*args, **options)

    kernel = VarlenAttention(varlen)
    q = torch.randn(4, 4, 8, generator=random)
    expected = attention_reference(q, cache[0], cache[1], batch, scale=0.3, window=window)
    for _ in range(2):
        got = kernel.plan(batch).attend(q, cache[0], cache[1], scale=0.3, window=window)
        torch.testing.assert_close(got, expected)
        assert kernel.reads_in_place == reads_blocks, "it is asked once, and remembered"


def test_the_attention_reference_on_numbers_worked_out_by_hand():
    """Two tokens, one head of size 1, keys 0 and ln 3, values 1 and 5: the second query (1) weighs them 1 : 3, so its
    answer is (1 + 15) / 4 = 4; with a window of 1 it sees itself only, 5. The first sees itself only, 1."""
    keys = torch.tensor([0.0, torch.log(torch.tensor(3.0))]).view(1, 2, 1, 1)
    values = torch.tensor([1.0, 5.0]).view(1, 2, 1, 1)
    batch = PagedBatch(
        query_lens=[2], context_lens=[2], block_tables=torch.tensor([[0]]), slot_mapping=torch.tensor([0, 1]),
        context_lens_tensor=torch.tensor([2]), padding_block=0,
    )  # fmt: skip
    q = torch.ones(2, 1, 1)
    assert attention_reference(q, keys, values, batch, scale=1.0, window=None).flatten().tolist() == pytest.approx(
        [1, 4]
    )
    assert attention_reference(q, keys, values, batch, scale=1.0, window=1).flatten().tolist() == pytest.approx([1, 5])
