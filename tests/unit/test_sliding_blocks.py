"""Layers whose window slides give their old blocks back: the answers stay transformers', and what a block holds once it
was given back reaches nobody."""

from types import SimpleNamespace

import pytest
import torch
from configs import dense
from triton_tools import gpu_kernels

from cluster import LLM, SamplingParams
from cluster.checkpoint.made.published import PUBLISHED
from cluster.checkpoint.made.synthetic import write_checkpoint
from cluster.config import EngineConfig, read_model_config
from cluster.engine.block_manager import BlockManager
from cluster.engine.block_pool import BlockPool
from cluster.engine.sequence import Sequence
from cluster.errors import InvalidRequest
from cluster.kernels.grouped_attention import GroupedAttention
from cluster.model.cache_size import num_kv_blocks
from cluster.types import SAMPLING_DEFAULTS, EngineRequest

WINDOW, BLOCK = 8, 4
SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW, "num_hidden_layers": 3}
MODELS = {
    "all layers slide": dense(**SLIDING, max_window_layers=0),
    "the last two slide": dense(**SLIDING, max_window_layers=1),
}
PROMPT = list(range(20, 41))
LONG = 20 * WINDOW


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    """A checkpoint, and transformers' greedy answer of 20 windows to PROMPT."""
    from transformers import AutoModelForCausalLM

    model_dir = tmp_path_factory.mktemp("sliding") / "model"
    write_checkpoint(model_dir, MODELS[request.param], seed=11)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager").eval()
    ids = list(PROMPT)
    with torch.inference_mode():
        for _ in range(LONG):  # no cache and no generate(): the plain definition
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return SimpleNamespace(model_dir=model_dir, tokens=ids[len(PROMPT) :], ids=ids)


def llm_of(case, **options):
    options = {"block_size": BLOCK, "kv_cache_bytes": 1 << 20, "max_num_batched_tokens": 16, **options}
    return LLM(case.model_dir, dtype="float32", device="cpu", skip_tokenizer=True, **options)


def answer(llm, prompt=PROMPT, max_tokens=LONG):
    params = SamplingParams(temperature=0, repetition_penalty=1.0, max_tokens=max_tokens, ignore_eos=True)
    return list(llm.generate([prompt], params)[0].token_ids)


def watch_steps(llm, look):
    """Calls look() behind each step."""
    run = llm.engine.runner.run

    def watched(batch):
        result = run(batch)
        look()
        return result

    llm.engine.runner.run = watched


def test_memory_is_flat_over_20_windows_and_the_answer_is_transformers(case):
    """16 new tokens at a time and a window of 8 need 23 tokens, whose blocks of 4 are 7 at most; a token at a time 8
    tokens, 3 blocks. Layers that see everything keep all blocks."""
    used = []
    with llm_of(case) as llm:
        pools = llm.engine.blocks.pools
        watch_steps(llm, lambda: used.append([pool.num_used for pool in pools]))
        assert answer(llm) == case.tokens
        prefill, decode = used[:2], used[2:]
        assert [pool.window for pool in pools] == [None, WINDOW][-len(pools) :]
        assert max(step[-1] for step in prefill) <= 7
        assert max(step[-1] for step in decode) == 3
        if len(pools) == 2:
            assert used[-1][0] == (len(PROMPT) + LONG - 1 + 3) // BLOCK
        assert llm.engine.blocks.num_used == 0


def test_a_prompt_of_20_windows_in_chunks_stays_flat(case):
    used = []
    with llm_of(case) as llm:
        pool = llm.engine.blocks.pools[-1]
        watch_steps(llm, lambda: used.append(pool.num_used))
        prompt = case.ids[: len(PROMPT) + LONG - 3]
        assert answer(llm, prompt, 3) == case.ids[len(prompt) :]
        assert max(used) <= 7


@pytest.mark.parametrize("kernel", ["native", "torch", "triton"])
def test_nan_in_blocks_that_were_given_back_reaches_nobody(case, kernel):
    """Every block that nobody holds is NaN behind each step; a new owner writes before it reads."""
    num_tokens = 6 if kernel == "triton" else LONG  # its interpreter is slow
    with llm_of(case, enable_prefix_caching=False) as llm:
        runner = llm.engine.runner
        if kernel == "torch":
            _, size, kv_heads, dim = runner.cache.layer(0)[0].shape
            runner.attention = GroupedAttention(block_size=size, num_kv_heads=kv_heads, row_bytes=kv_heads * dim * 4)
        if kernel == "triton":
            config = runner.model.config
            group = config.num_attention_heads // config.num_key_value_heads
            runner.attention = gpu_kernels("attention").PagedAttention(group)

        def poison():
            for pool, group in zip(llm.engine.blocks.pools, runner.cache.groups, strict=True):
                for memory in (group.keys, group.values):
                    memory[:, list(pool._free)] = torch.nan

        watch_steps(llm, poison)
        poison()
        assert answer(llm, max_tokens=num_tokens) == case.tokens[:num_tokens]


def test_two_sequences_share_a_pool_that_holds_both_windows_and_no_more(case):
    """Eight blocks: each needs 4 at most, for 7 tokens before the first of 4 new ones."""
    with llm_of(case, max_num_seqs=2, max_num_batched_tokens=4) as llm:
        blocks = llm.engine.blocks
        assert blocks.pools[-1].num_blocks == 2 * (-(-(WINDOW - 1 + 4) // BLOCK) + 1)
        assert blocks.max_tokens >= len(PROMPT) + LONG
        params = SamplingParams(temperature=0, repetition_penalty=1.0, max_tokens=LONG, ignore_eos=True)
        outputs = llm.generate([PROMPT, PROMPT], params)
        assert [list(output.token_ids) for output in outputs] == [case.tokens] * 2


def test_a_beginning_is_found_while_its_last_window_is_there(case):
    """Blocks of 4: of a prompt of 41 tokens 40 are found again, though the sliding layers have the last two alone."""
    prompt = case.ids[:41]
    with llm_of(case, max_num_batched_tokens=64) as llm:
        first = answer(llm, prompt, 4)
        assert first == case.ids[41:45]
        reused = []
        reuse = llm.engine.blocks.reuse
        llm.engine.blocks.reuse = lambda sequence: reused.append(reuse(sequence)) or reused[-1]
        assert answer(llm, prompt, 4) == first
        assert answer(llm, case.ids[:30], 4) == case.ids[30:34]
        assert reused == [40, 28]


def sequence_of(length):
    params = SamplingParams(max_tokens=1).with_defaults(SAMPLING_DEFAULTS)
    request = EngineRequest(request_id="a", prompt_token_ids=tuple(range(length)), params=params)
    return Sequence(request=request, params=params, stop_token_ids=frozenset(), arrived_at=0.0, deadline=None)


def computed(blocks, length):
    """A sequence of `length` tokens after steps of at most 8."""
    sequence = sequence_of(length)
    blocks.reuse(sequence)
    while sequence.num_uncomputed_tokens:
        num_tokens = min(8, sequence.num_uncomputed_tokens)
        assert blocks.allocate(sequence, sequence.num_computed_tokens + num_tokens)
        sequence.num_computed_tokens += num_tokens
        blocks.remember(sequence)
    return sequence


def manager(full, sliding):
    pools = ([BlockPool(full)] if full else []) + [BlockPool(sliding, WINDOW)]
    return BlockManager(pools, BLOCK, max_step_tokens=8, prefix_caching=True)


@pytest.mark.parametrize("full", [0, 20])
def test_a_hit_needs_the_last_window_in_the_sliding_group(full):
    """40 tokens in steps of 8 leave blocks 8 and 9 with the sequence (the next token sees 33 to 40), 0 to 7 idle. Of 12
    blocks, taking 3 evicts block 0 first; then a prompt of 5 tokens, which needs it, finds nothing, and one of 13,
    which sees 5 to 12 behind its third block, still finds 12."""
    blocks = manager(full, 12)
    sequence = computed(blocks, 40)
    assert [len(table.held()) for table in sequence.block_tables] == ([10, 2] if full else [2])
    blocks.free(sequence)
    taken = [blocks.pools[-1].take() for _ in range(3)]
    short, longer, whole = sequence_of(5), sequence_of(13), sequence_of(41)
    assert (blocks.reuse(short), blocks.reuse(longer), blocks.reuse(whole)) == (0, 12, 40)
    assert longer.block_tables[-1].num_dropped == 1
    for each in (short, longer, whole):
        blocks.free(each)
    for block_id in taken:
        blocks.pools[-1].let_go(block_id)
    assert blocks.num_used == 0


def test_blocks_that_a_faulty_sequence_gave_back_are_found_by_nobody():
    blocks = manager(20, 12)
    sequence = computed(blocks, 40)
    blocks.disown(sequence)
    blocks.free(sequence)
    assert blocks.reuse(sequence_of(41)) == 0
    assert [pool.num_free for pool in blocks.pools] == [20, 12]


def test_a_group_that_has_no_room_leaves_all_as_they_were():
    blocks = manager(20, 2)
    sequence = sequence_of(12)
    assert not blocks.allocate(sequence, 12)
    assert [pool.num_used for pool in blocks.pools] == [0, 0]
    assert blocks.max_tokens == 8  # a window of 8 and a step of 8 need 15 tokens, 5 blocks
    assert manager(20, 5).max_tokens == 80
    assert manager(0, 5).max_tokens > 1 << 40


def test_memory_is_shared_out_to_both_groups():
    """A block is 16 tokens of 2 * 2 heads * 8 numbers * 4 bytes: 2048 a layer. A sliding layer's sequence has at most
    (8 - 1 + 64 tokens in blocks of 16) + 1 = 6 blocks, one of 160 tokens has 10."""
    config = read_model_config(MODELS["the last two slide"])
    engine = EngineConfig(max_num_seqs=4, max_num_batched_tokens=64, kv_cache_bytes=2048 * 3 * 10)
    sizes = {"max_model_len": 160, "room_bytes": None, "share": 1.0}
    assert num_kv_blocks(config, engine, "float32", **sizes) == (10, 10)
    more = EngineConfig(max_num_seqs=4, max_num_batched_tokens=64, kv_cache_bytes=2048 * (2 * 24 + 31))
    assert num_kv_blocks(config, more, "float32", **sizes) == (31, 24)
    most = EngineConfig(max_num_seqs=4, max_num_batched_tokens=64, kv_cache_bytes=1 << 30)
    assert num_kv_blocks(config, most, "float32", **sizes) == (40, 24)


def test_fewer_sequences_leave_the_full_layers_more_blocks():
    """As docs/computing.md says: 20 GiB for Qwen2.5-7B in bfloat16, half of whose layers see 4,096 tokens. A context of
    32,768 takes 2,048 blocks of 16 tokens in the full layers, and (4,095 + 2,048 new tokens) / 16 + 1 = 385 in the
    others."""
    slides = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 14}
    config = read_model_config(PUBLISHED["Qwen2.5-7B"] | slides)

    def contexts(max_num_seqs):
        engine = EngineConfig(max_num_seqs=max_num_seqs, kv_cache_bytes=20 << 30)
        sizes = {"max_model_len": 32768, "room_bytes": None, "share": 1.0}
        full, sliding = num_kv_blocks(config, engine, "bfloat16", **sizes)
        return min(full // 2048, sliding // 385, max_num_seqs)

    block_bytes = 16 * config.kv_bytes_per_token("bfloat16") // 2
    assert (20 << 30) // ((2048 + 385) * block_bytes) == 19
    assert (contexts(EngineConfig().max_num_seqs), contexts(19)) == (11, 19)


def test_a_request_is_as_long_as_the_full_layers_have_room(case):
    """16 blocks in each group; only layers that see everything need more for more than 64 tokens."""
    config = read_model_config(MODELS["all layers slide"])
    with llm_of(case, kv_cache_bytes=16 * BLOCK * config.kv_bytes_per_token("float32")) as llm:
        if len(llm.engine.blocks.pools) == 1:
            assert answer(llm) == case.tokens
            return
        with pytest.raises(InvalidRequest, match="the KV cache holds 64"):
            answer(llm)
        assert answer(llm, max_tokens=64 - len(PROMPT)) == case.tokens[: 64 - len(PROMPT)]
