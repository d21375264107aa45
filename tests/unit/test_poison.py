"""NaN and infinity stay where they arose: no other sequence's answer shows them, nor that of a token before them."""

import contextlib
import itertools
import json
import math
import shutil

import pytest
import torch
from attention_tools import paged_attention
from engine_fakes import request
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from weight_tools import packed, plain

from cluster.checkpoint.reader import CheckpointReader
from cluster.kernels.experts import experts_by_grouped_mm, experts_by_loop
from cluster.kernels.paged import PagedBatch, attention_reference, write_kv
from cluster.kernels.varlen_attention import VarlenAttention
from cluster.kernels.weights import packs
from cluster.llm import LLM

POISON_ID = 5
HARMLESS_ID = 6
EMBEDDINGS = "model.embed_tokens.weight"
# Too large a number is enough: what is masked by adding minus infinity to infinity is NaN.
WILD = {"nan": torch.nan, "infinity": torch.inf, "huge": 3e38}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}


def paged(lengths, random, dtype, *, block_size=4, kv_heads=2, head_dim=8, groups=2, wild=0.0):
    """A cache full of `wild` but for the sequences' own older tokens, and q, k, v of their new ones. Block 0 is zeros.

    lengths: (new tokens, older ones) of each. Returns the cache [2, blocks, S, KV, D], q, k, v and the batch.
    """
    context_lens = [new + old for new, old in lengths]
    widths = [-(-length // block_size) for length in context_lens]
    blocks = [1 + block for block in torch.randperm(sum(widths), generator=random).tolist()]
    tables = torch.zeros(len(lengths), max(widths), dtype=torch.int64)
    cache = torch.full((2, 1 + sum(widths), block_size, kv_heads, head_dim), wild, dtype=torch.float64).to(dtype)
    cache[:, 0] = 0
    slots = []
    for row, (width, (new, old)) in enumerate(zip(widths, lengths, strict=True)):
        table = [blocks.pop() for _ in range(width)]
        tables[row, :width] = torch.tensor(table)
        every = [table[i // block_size] * block_size + i % block_size for i in range(old + new)]
        slots += every[old:]
        older = torch.randn(2, old, kv_heads, head_dim, generator=random).to(dtype)
        cache.view(2, -1, kv_heads, head_dim)[:, every[:old]] = older
    total = sum(new for new, _ in lengths)
    q = torch.randn(total, groups * kv_heads, head_dim, generator=random).to(dtype)
    k, v = torch.randn(2, total, kv_heads, head_dim, generator=random).to(dtype)
    batch = PagedBatch(
        query_lens=[new for new, _ in lengths], context_lens=context_lens, block_tables=tables,
        slot_mapping=torch.tensor(slots), context_lens_tensor=torch.tensor(context_lens), padding_block=0,
    )  # fmt: skip
    return cache, q, k, v, batch


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 12)), min_size=1, max_size=5),
    decodes=st.booleans(),
    window=st.sampled_from([None, 1, 3, 8]),
    dtype=st.sampled_from(list(TOLERANCE)),
    wild=st.sampled_from(list(WILD)),
)
def test_attention_gets_nothing_from_slots_that_are_not_its_own(seed, lengths, decodes, window, dtype, wild):
    if decodes:
        lengths = [(1, old) for _, old in lengths]
    cache, q, k, v, batch = paged(lengths, torch.Generator().manual_seed(seed), dtype, wild=WILD[wild])
    write_kv(cache[0], cache[1], k, v, batch.slot_mapping)
    expected = attention_reference(q, cache[0], cache[1], batch, scale=0.3, window=window)
    got = paged_attention(q, cache[0], cache[1], batch, scale=0.3, window=window)
    assert got.isfinite().all()
    torch.testing.assert_close(got.float(), expected.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=4),
    window=st.sampled_from([None, 3]),
    dtype=st.sampled_from(list(TOLERANCE)),
    wild=st.sampled_from(list(WILD)),
    data=st.data(),
)
def test_attention_gets_nothing_from_its_own_later_tokens(seed, lengths, window, dtype, wild, data):
    """One new token has wild keys and values. Tokens that do not see it are as without it; those that see it are not,
    for that would hide it."""
    cache, q, k, v, batch = paged(lengths, torch.Generator().manual_seed(seed), dtype)
    place = data.draw(st.integers(0, len(q) - 1))
    wild_k, wild_v = k.clone(), v.clone()
    wild_k[place] = wild_v[place] = WILD[wild]
    first = 0
    sees = torch.zeros(len(q), dtype=torch.bool)
    for new, _ in lengths:
        if first <= place < first + new:
            sees[place : min(first + new, place + (window or new))] = True
        first += new
    write_kv(cache[0], cache[1], k, v, batch.slot_mapping)
    expected = attention_reference(q, cache[0], cache[1], batch, scale=0.3, window=window)
    write_kv(cache[0], cache[1], wild_k, wild_v, batch.slot_mapping)
    got = paged_attention(q, cache[0], cache[1], batch, scale=0.3, window=window)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got[~sees].float(), expected[~sees].float(), atol=tolerance, rtol=tolerance)
    if wild != "huge":
        assert not got[sees].isfinite().any()


def test_only_the_rows_that_saw_nan_are_repaired_to_nan():
    """The values of one head are NaN in one dimension: by the definition the other numbers stay what they are."""
    cache, q, k, v, batch = paged([(6, 0)], torch.Generator().manual_seed(1), torch.float32)
    v[3, 1, 2] = torch.nan
    write_kv(cache[0], cache[1], k, v, batch.slot_mapping)
    got = paged_attention(q, cache[0], cache[1], batch, scale=0.3, window=None)
    expected = attention_reference(q, cache[0], cache[1], batch, scale=0.3, window=None)
    assert expected.isnan().sum() == 3 * 2  # queries 3, 4 and 5, the two heads of the second pair
    torch.testing.assert_close(got, expected, equal_nan=True)


def loop_over_plain(x, ids, weights, gate_up, down):
    return experts_by_loop(x, ids, weights, [plain(w) for w in gate_up], [plain(w) for w in down])


@pytest.mark.parametrize("product", [loop_over_plain, experts_by_grouped_mm])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_of_nan_reaches_no_other_row_of_the_experts(product, dtype):
    random = torch.Generator().manual_seed(2)
    x = torch.randn(9, 16, generator=random).to(dtype)
    ids = torch.randint(-1, 4, (9, 3), generator=random)
    weights = torch.rand(9, 3, generator=random)
    gate_up = torch.randn(4, 16, 16, generator=random).to(dtype)
    down = torch.randn(4, 16, 8, generator=random).to(dtype)
    expected = product(x, ids, weights, gate_up, down)
    for row in range(9):
        poisoned, poisoned_weights = x.clone(), weights.clone()
        poisoned[row] = poisoned_weights[row] = torch.nan
        got = product(poisoned, ids, poisoned_weights, gate_up, down)
        others = torch.arange(9) != row
        assert torch.equal(got[others], expected[others])


@pytest.mark.skipif(not packs(torch.bfloat16, torch.device("cpu")), reason="this CPU's oneDNN has no bfloat16 products")
def test_a_row_of_nan_reaches_no_other_row_of_packed_weights():
    """Fewer rows than the packed product takes are filled up with the first one, or with another expert's."""
    random = torch.Generator().manual_seed(3)
    linear = packed(torch.randn(48, 64, generator=random).bfloat16())
    gate_up = [packed(w.bfloat16()) for w in torch.randn(3, 96, 64, generator=random)]
    down = [packed(w.bfloat16()) for w in torch.randn(3, 64, 48, generator=random)]
    with torch.inference_mode():
        for num_rows in (2, 3, 5, 17):
            x = torch.randn(num_rows, 64, generator=random).bfloat16()
            ids = torch.randint(0, 3, (num_rows, 2), generator=random)
            weights = torch.rand(num_rows, 2, generator=random)
            expected = linear.product(x), experts_by_loop(x, ids, weights, gate_up, down)
            for row in range(num_rows):
                poisoned = x.clone()
                poisoned[row] = torch.nan
                others = torch.arange(num_rows) != row
                assert torch.equal(linear.product(poisoned)[others], expected[0][others])
                got = experts_by_loop(poisoned, ids, weights, gate_up, down)
                assert torch.equal(got[others], expected[1][others])


@pytest.fixture(scope="module")
def nan_checkpoint(demo_checkpoint, tmp_path_factory):
    """The demo checkpoint with the embedding of POISON_ID set to NaN."""

    def poison(tensors):
        if EMBEDDINGS in tensors:
            tensors[EMBEDDINGS][POISON_ID] = torch.nan

    return edited(demo_checkpoint, tmp_path_factory.mktemp("nan") / "demo", poison)


@pytest.fixture(scope="module")
def overflowing_checkpoint(demo_checkpoint, tmp_path_factory):
    """float16, every weight finite: POISON_ID's residual begins at the largest number, and the first layer adds to
    it."""

    def poison(tensors):
        for name in tensors:
            tensors[name] = tensors[name].half()
        if EMBEDDINGS in tensors:
            tensors[EMBEDDINGS][POISON_ID] = torch.finfo(torch.float16).max
        if (o_proj := "model.layers.0.self_attn.o_proj.weight") in tensors:
            tensors[o_proj] *= 100
        assert all(tensor.isfinite().all() for tensor in tensors.values())

    model_dir = edited(demo_checkpoint, tmp_path_factory.mktemp("overflow") / "demo", poison)
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps({**config, "torch_dtype": "float16"}))
    return model_dir


def edited(model_dir, copy_dir, edit):
    """A copy of a checkpoint after `edit` of each file's tensors."""
    shutil.copytree(model_dir, copy_dir)
    for file in copy_dir.glob("*.safetensors"):
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
    return copy_dir


@contextlib.contextmanager
def llm_of_16_blocks(model_dir, dtype, **options):
    block_bytes = 16 * CheckpointReader(model_dir).config.kv_bytes_per_token(dtype)
    with LLM(
        model_dir, dtype=dtype, device="cpu", skip_tokenizer=True, kv_cache_bytes=16 * block_bytes, **options
    ) as llm:
        yield llm


numbers = itertools.count()


def answers(llm, prompts, crowd=(), **params):
    """Token ids and log-probabilities of all prompts, asked at once; first the crowd's, which want one token each. A
    poisoned one ends with an error."""
    params = {"max_tokens": 8, "ignore_eos": True, **params}
    requests = [request(f"poison-{next(numbers)}", prompt, **params | {"max_tokens": 1}) for prompt in crowd]
    requests += [request(f"poison-{next(numbers)}", prompt, **params) for prompt in prompts]
    got = {r.request_id: ([], []) for r in requests}
    for r in requests:
        llm.engine.submit(r)
    while llm.engine.has_work:
        for update in llm.engine.step():
            token_ids, logprobs = got[update.request_id]
            token_ids += update.token_ids
            logprobs += [entry.logprob for entry in update.logprobs]
    return list(got.values())[len(crowd) :]


def prompt(first, length):
    return list(range(first, first + length))


# Two at a time: the shorter one is padded. Their blocks are those that the poisoned ones before had.
HEALTHY = [[prompt(10, 7), prompt(50, 13)], [prompt(80, 20), prompt(110, 33)], [prompt(150, 40), prompt(200, 25)]]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_request_after_a_poisoned_one_is_answered_as_ever(nan_checkpoint, dtype):
    # In bfloat16 an answer may depend on how many of its tokens are found in the cache.
    options = {"enable_prefix_caching": dtype == "float32"}
    with llm_of_16_blocks(nan_checkpoint, dtype, **options) as llm:
        expected = [answers(llm, prompts) for prompts in HEALTHY]
    with llm_of_16_blocks(nan_checkpoint, dtype, **options) as llm:
        for number in range(12):
            answers(llm, [[POISON_ID] * 40])
            assert answers(llm, HEALTHY[number % 3]) == expected[number % 3]
            alone = HEALTHY[number % 3][0]
            answers(llm, [[POISON_ID] * 40])
            assert answers(llm, [alone], max_tokens=1)[0][0] == expected[number % 3][0][0][:1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_requests_beside_twelve_poisoned_ones_are_answered_as_beside_healthy_ones(nan_checkpoint, dtype):
    """In bfloat16 answers may depend on how many rows a product has, so there are as many in both runs."""

    def crowd(token_id):
        return [[token_id] * length for length in range(3, 15)]

    with llm_of_16_blocks(nan_checkpoint, dtype, enable_prefix_caching=False) as llm:
        for prompts in HEALTHY[:2]:
            expected = answers(llm, prompts, crowd(HARMLESS_ID))
            assert answers(llm, prompts, crowd(POISON_ID)) == expected


def test_an_overflow_in_one_request_leaves_the_next_ones_log_probabilities_alone(overflowing_checkpoint):
    with llm_of_16_blocks(overflowing_checkpoint, "float16") as llm:
        expected = [answers(llm, prompts, logprobs=0) for prompts in HEALTHY]
    with llm_of_16_blocks(overflowing_checkpoint, "float16") as llm:
        poisoned = llm.logits([POISON_ID] * 3)
        assert not poisoned.isfinite().any()
        for number, prompts in enumerate(HEALTHY):
            answers(llm, [[POISON_ID] * 40])
            got = answers(llm, prompts, logprobs=0)
            assert got == expected[number]
            assert all(math.isfinite(value) for _, logprobs in got for value in logprobs)
            assert sum(len(logprobs) for _, logprobs in got) == 16


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_poisoned_end_leaves_the_shared_beginning_sound(nan_checkpoint, dtype):
    """A prompt's first blocks are found by the next one that begins alike: what came behind them is not in them."""
    beginning, end = prompt(10, 64), [POISON_ID] * 8
    with llm_of_16_blocks(nan_checkpoint, dtype) as llm:
        expected = answers(llm, [[*beginning, 90]])
        logits = llm.logits(beginning)
    with llm_of_16_blocks(nan_checkpoint, dtype) as llm:
        answers(llm, [[*beginning, *end]])
        assert answers(llm, [[*beginning, 90]])[0][0] == expected[0][0]
        got = llm.logits([*beginning, *end])
        torch.testing.assert_close(got[:64], logits, atol=0.3 if dtype == "bfloat16" else 1e-4, rtol=0)
        assert not got[64:].isfinite().any()


def test_a_kernel_that_reads_whole_blocks_finds_zeros_past_the_end(nan_checkpoint):
    """As one on a GPU may: it multiplies all that stands in a sequence's blocks, and in those it was padded with, by a
    probability, which is zero past the sequence's end."""

    def careless(q, k, v, cu_queries, _, max_q, max_k, *, scale, window_size, seqused_k, block_table, enable_gqa=False):
        out = torch.empty_like(q)
        for i, (start, stop) in enumerate(itertools.pairwise(cu_queries.tolist())):
            keys, values = (x[block_table[i]].flatten(0, 1) for x in (k, v))
            groups = q.shape[1] // keys.shape[1]
            keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
            scores = torch.einsum("tqd,cqd->qtc", q[start:stop], keys) * scale
            queries = torch.arange(int(seqused_k[i]) - (stop - start), int(seqused_k[i])).unsqueeze(1)
            probs = scores.masked_fill(torch.arange(len(keys)) > queries, -torch.inf).softmax(dim=-1)
            out[start:stop] = torch.einsum("qtc,cqd->tqd", probs, values)
        return out

    with llm_of_16_blocks(nan_checkpoint, "float32") as llm:
        expected = [answers(llm, prompts) for prompts in HEALTHY]
    with llm_of_16_blocks(nan_checkpoint, "float32") as llm:
        llm.engine.runner.attention = VarlenAttention(careless)
        for prompts, tokens in zip(HEALTHY, expected, strict=True):
            answers(llm, [[POISON_ID] * 40, [POISON_ID] * 60])
            assert answers(llm, prompts) == tokens


def test_the_padding_block_stays_zero(nan_checkpoint):
    with llm_of_16_blocks(nan_checkpoint, "float32") as llm:
        answers(llm, [[POISON_ID] * 40, *HEALTHY[2]])
        cache = llm.engine.runner.cache
        [group] = cache.groups
        for memory in (group.keys, group.values):
            assert memory.shape[1] == llm.engine.blocks.num_blocks + 1
            assert not memory[:, group.padding_block].any()
            assert memory.isnan().any()
