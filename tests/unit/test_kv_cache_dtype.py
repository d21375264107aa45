"""Whole models whose keys and values are in 8 bits: near to the float cache, the same tokens however their steps fall,
and twice the tokens in the same memory. Odd values are refused before anything loads."""

import pytest
import torch
from configs import config, dense

from cluster import LLM, SamplingParams, llm
from cluster.checkpoint.made.published import PUBLISHED
from cluster.checkpoint.made.synthetic import write_checkpoint
from cluster.config import ClusterConfig, EngineConfig, read_model_config
from cluster.engine import load
from cluster.errors import SetupError
from cluster.kernels.cache_rows import as_bytes, cache_torch_dtype, unpacked
from cluster.model.cache_size import num_kv_blocks
from cluster.model.kv_cache import KVCache

MODELS = {
    "experts, heads of 64": config(num_experts=8, head_dim=64, num_hidden_layers=2),
    "dense, heads of 128, one layer slides": dense(
        head_dim=128,
        num_attention_heads=7,
        num_key_value_heads=1,
        hidden_size=28,
        use_sliding_window=True,
        sliding_window=9,
        max_window_layers=1,
        num_hidden_layers=2,
    ),
}
PROMPTS = [[(7 * i * i + 3 * i + n) % 211 for i in range(30 + 5 * n)] for n in range(3)]
each_form = pytest.mark.parametrize("form", ["int8", "fp8"])


@pytest.fixture(scope="module", params=MODELS)
def model_dir(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "model"
    write_checkpoint(folder, MODELS[request.param], seed=3)
    return folder


def llm_of(model_dir, form, **options):
    options = {"dtype": "float32", "kv_cache_bytes": 1 << 21, "block_size": 4, **options}
    return LLM(model_dir, device="cpu", skip_tokenizer=True, kv_cache_dtype=form, **options)


def answers(llm, prompts, max_tokens=6):
    params = SamplingParams(temperature=0, repetition_penalty=1.0, max_tokens=max_tokens, ignore_eos=True)
    return [list(output.token_ids) for output in llm.generate(prompts, params)]


@each_form
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_near_those_of_a_float_cache(model_dir, form, dtype):
    """e4m3 has a relative error of 1/16 at most, a number of 8 whole bits one of 1/254 of the largest in its row."""
    found = []
    for each in ("auto", form):
        with llm_of(model_dir, each, dtype=dtype) as llm:
            found.append(torch.cat([llm.logits(prompt) for prompt in PROMPTS]).double())
    error = (found[1] - found[0]).norm() / found[0].norm()
    assert 0 < error < (0.03 if form == "int8" else 0.12)


@each_form
def test_greedy_tokens_are_the_same_however_the_steps_fall(model_dir, form):
    """Together; alone; in chunks of 7; behind a cached beginning; and going on elsewhere from half of the answer, as a
    replay does."""
    with llm_of(model_dir, form) as llm:
        expected = answers(llm, PROMPTS)
        assert answers(llm, PROMPTS) == expected
        assert [answers(llm, [prompt])[0] for prompt in PROMPTS] == expected
    with llm_of(model_dir, form, max_num_batched_tokens=7, enable_prefix_caching=False) as llm:
        assert answers(llm, PROMPTS) == expected
        halves = [prompt + tokens[:3] for prompt, tokens in zip(PROMPTS, expected, strict=True)]
        assert answers(llm, halves, 3) == [tokens[3:] for tokens in expected]


def rows_of(llm, prompts):
    """The rows of the first prompt's tokens in each layer once all are computed: [2, tokens, KV, W]."""
    runner, rows = llm.engine.runner, []
    run = runner.run

    def watched(batch):
        result = run(batch)
        for scheduled in batch.scheduled:
            sequence = scheduled.sequence
            ends = sequence.num_computed_tokens + scheduled.num_tokens == len(prompts[0])
            if ends and list(sequence.token_ids)[: len(prompts[0])] == prompts[0]:
                [table] = sequence.block_tables
                slots = [table.id_of(i // 4) * 4 + i % 4 for i in range(len(prompts[0]))]
                for layer_id in range(2):
                    caches = (as_bytes(cache).flatten(0, 1) for cache in runner.cache.layer(layer_id))
                    rows.append(torch.stack([cache[slots] for cache in caches]))
        return result

    runner.run = watched
    answers(llm, prompts, 1)
    return rows


@each_form
def test_the_bytes_of_a_token_depend_on_no_batch_and_on_no_chunk(tmp_path, form):
    """Those of the first layer, whose inputs are the embeddings, bit for bit; those of the second come from sums in
    another order, so a number may fall to the other side of a half: by one step of e4m3, an 8th, or of int8."""
    write_checkpoint(tmp_path / "model", MODELS["experts, heads of 64"], seed=3)
    found = []
    for prompts, budget in (([PROMPTS[0]], 2048), (PROMPTS, 2048), (PROMPTS, 7)):
        with llm_of(tmp_path / "model", form, max_num_batched_tokens=budget, enable_prefix_caching=False) as llm:
            found.append(rows_of(llm, prompts))
    dtype = cache_torch_dtype(form)
    for other in found[1:]:
        assert torch.equal(other[0], found[0][0])
        numbers, expected = (unpacked(layers[1], dtype, torch.float32) for layers in (other, found[0]))
        assert ((numbers - expected).abs() <= expected.abs().amax(dim=-1, keepdim=True) / 8).all()


@each_form
def test_a_cache_holds_twice_the_tokens(form):
    """Of Qwen1.5-MoE-A2.7B: 128 numbers and a scale of 2 bytes in place of 256 bytes."""
    model = read_model_config(PUBLISHED["Qwen1.5-MoE-A2.7B"])

    def tokens(name):
        engine = EngineConfig(kv_cache_bytes=8 << 30, kv_cache_dtype=name)
        [blocks] = num_kv_blocks(model, engine, "bfloat16", max_model_len=8192, room_bytes=None, share=1.0)
        return 16 * blocks

    assert tokens("auto") == (8 << 30) // (16 * 196_608) * 16
    assert tokens(form) == (8 << 30) // (16 * 99_840) * 16
    assert 1.96 < tokens(form) / tokens("auto") < 1.97


@each_form
def test_the_memory_is_what_was_counted_and_begins_as_zeros(form):
    model = read_model_config(MODELS["dense, heads of 128, one layer slides"])
    dtype = cache_torch_dtype(form)
    cache = KVCache(model, [5, 3], 4, dtype=dtype, device=torch.device("cpu"))
    assert cache.num_bytes == (5 + 3) * 4 * model.kv_bytes_per_token(form, 1)
    for group in cache.groups:
        assert not unpacked(as_bytes(group.keys), dtype, torch.float32).any()
        as_bytes(group.values).fill_(-1)
        group.clear(torch.tensor([1, 6]).numpy())
        rows = as_bytes(group.values).flatten(1, 2)
        assert not rows[:, [1, 6]].any()
        assert (rows[:, [0, 2, 3, 4, 5, 7]] == -1).all()


def test_what_cannot_be_is_refused_before_anything_loads(model_dir, monkeypatch):
    for wrong in ("fp16", "int4", "e4m3", 8, None, ""):
        with pytest.raises(SetupError, match=r"kv_cache_dtype is .*one of auto, fp8, int8 is needed"):
            EngineConfig(kv_cache_dtype=wrong)
    with pytest.raises(SetupError, match="kv_cache_dtype is 'fp8': keys and values in 8 bits are read on CPUs only"):
        ClusterConfig(model="m", device="cuda", kv_cache_dtype="fp8")
    with pytest.raises(SetupError, match="not on cuda"):
        ClusterConfig(model="m", gpus_per_attention_replica=0.5, kv_cache_dtype="int8")
    ClusterConfig(model="m", device="cpu", gpus_per_attention_replica=0.5, kv_cache_dtype="int8")
    monkeypatch.setattr(load, "load_model", lambda *_, **__: pytest.fail("it was loaded"))
    monkeypatch.setattr(llm, "local_experts", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(SetupError, match="one block of 16 tokens takes"):
        LLM(model_dir, skip_tokenizer=True, kv_cache_dtype="int8", kv_cache_bytes=100)
    monkeypatch.setattr(load, "resolve_device", lambda _: torch.device("cuda"))
    with pytest.raises(SetupError, match=r"kv_cache_dtype is 'int8'.*not on cuda: set kv_cache_dtype to auto"):
        LLM(model_dir, skip_tokenizer=True, kv_cache_dtype="int8")
