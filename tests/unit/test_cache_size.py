"""How large the KV cache is when nobody says, and how long an answer may become in it."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from engine_fakes import make_engine, request, run_to_end

from cluster.checkpoint.reader import CheckpointReader
from cluster.config import ClusterConfig, EngineConfig
from cluster.console import describe_cache
from cluster.engine import load
from cluster.engine.fitting import fitting
from cluster.errors import InvalidRequest, SetupError
from cluster.llm import LLM
from cluster.model.cache_size import MIN_BYTES, UNKNOWN_BYTES, num_kv_blocks
from cluster.runtime.process import num_sharers
from cluster.runtime.start import application
from cluster.types import SamplingParams

GIB = 1 << 30
TOKEN_BYTES = 1024  # of the demo checkpoint in float32: 2 * 4 layers * 2 heads * 16 numbers * 4 bytes
BLOCK_BYTES = 16 * TOKEN_BYTES


@pytest.fixture(scope="module")
def model_config(demo_checkpoint):
    config = CheckpointReader(demo_checkpoint).config
    assert config.kv_bytes_per_token("float32") == TOKEN_BYTES
    return config


@pytest.mark.parametrize(
    ("limits", "room", "share", "blocks"),
    [
        ({}, 2 * GIB, 0.5, GIB // BLOCK_BYTES),
        ({}, 2 * GIB, 0.25, GIB // 2 // BLOCK_BYTES),
        ({}, 1000, 0.5, MIN_BYTES // BLOCK_BYTES),
        ({}, 0, 0.5, MIN_BYTES // BLOCK_BYTES),
        ({}, None, 0.5, UNKNOWN_BYTES // BLOCK_BYTES),
        ({"kv_cache_bytes": 10 * BLOCK_BYTES + 1}, 2 * GIB, 0.5, 10),
        ({"kv_cache_bytes": GIB}, 0, 0.5, GIB // BLOCK_BYTES),
        # 3 sequences of 100,000 tokens use 6250 blocks each at most
        ({"max_num_seqs": 3}, 100 * GIB, 0.5, 3 * 6250),
        ({"max_num_seqs": 3, "kv_cache_bytes": 50 * GIB}, 100 * GIB, 0.5, 3 * 6250),
    ],
)
def test_the_cache_has_its_share_of_what_is_free(model_config, limits, room, share, blocks):
    assert num_kv_blocks(
        model_config, EngineConfig(**limits), "float32", max_model_len=100_000, room_bytes=room, share=share
    ) == (blocks,)


def test_a_size_below_one_block_is_refused(model_config):
    with pytest.raises(SetupError, match=f"kv_cache_bytes is 5, one block of 16 tokens takes {BLOCK_BYTES}"):
        num_kv_blocks(
            model_config, EngineConfig(kv_cache_bytes=5), "float32", max_model_len=4096, room_bytes=GIB, share=0.5
        )


@pytest.mark.parametrize(("replicas", "fits"), [(0, True), (1, True), (3, True), (4, False)])
def test_caches_that_the_whole_machine_has_no_room_for_are_refused(demo_checkpoint, monkeypatch, replicas, fits):
    """64 sequences of 4,096 tokens use 256 MiB at most, whatever is asked for beyond; the machine has 1,000 MiB."""
    monkeypatch.setattr(application, "memory_limit", lambda: 1000 << 20)
    config = ClusterConfig(model=str(demo_checkpoint), device="cpu", kv_cache_bytes=10**12)
    with nullcontext() if fits else pytest.raises(SetupError, match=r"kv_cache_bytes is 10{12}: .* 4 .*1\.07 GB"):
        application.check_memory(config, attention_replicas=replicas)


def test_processes_that_the_machine_has_no_room_for_are_refused(demo_checkpoint, monkeypatch):
    """100 MB each at least."""
    monkeypatch.setattr(application, "memory_limit", lambda: 10**9)
    config = ClusterConfig(model=str(demo_checkpoint), device="cpu", expert_shards=5)
    application.check_memory(config, attention_replicas=3, ingresses=2)
    with pytest.raises(SetupError, match=r"11 processes are asked for .* this machine has 1 GB"):
        application.check_memory(config, attention_replicas=4, ingresses=2)


def test_an_llm_refuses_a_cache_that_its_machine_has_no_room_for(demo_checkpoint, monkeypatch):
    monkeypatch.setattr(load, "memory_limit", lambda: 100 << 20)
    with pytest.raises(SetupError, match=r"kv_cache_bytes is 1000000000000: a cache takes 0\.268 GB"):
        LLM(demo_checkpoint, device="cpu", skip_tokenizer=True, kv_cache_bytes=10**12)


@pytest.mark.parametrize("value", [0, 1.5, -1])
def test_a_share_that_is_none_is_refused(value):
    with pytest.raises(SetupError, match="memory_utilization is"):
        ClusterConfig(model="/m", memory_utilization=value)


@pytest.mark.parametrize(
    ("options", "blocks"),
    [
        ({}, 150 * 1024 // 16),  # half of 300 MiB
        ({"memory_utilization": 0.8}, 240 * 1024 // 16),
        ({"max_model_len": 512, "max_num_seqs": 2}, 2 * 512 // 16),
    ],
)
def test_an_llm_takes_its_share_of_the_machine(demo_checkpoint, monkeypatch, options, blocks):
    monkeypatch.setattr(load, "available_memory", lambda: 300 << 20)
    with LLM(demo_checkpoint, device="cpu", skip_tokenizer=True, **options) as llm:
        assert llm.engine.blocks.num_blocks == blocks


def test_the_free_memory_of_a_gpu_is_what_its_driver_has_left_of_that_one(monkeypatch):
    """After torch has given back what it keeps of freed tensors; the machine's own memory is another one."""
    kept, free = {"bytes": 3 * GIB}, {0: 50 * GIB, 1: 7 * GIB}
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: kept.update(bytes=0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (free[gpu.index] - kept["bytes"], 80 * GIB))
    monkeypatch.setattr(load, "available_memory", lambda: GIB)
    assert load.free_memory(torch.device("cuda", 1)) == 7 * GIB
    assert load.free_memory(torch.device("cpu")) == GIB


def test_memory_is_looked_at_when_the_shards_have_loaded(demo_checkpoint, monkeypatch):
    """Two engines on the machine share what the shards have left of it."""
    from cluster.metrics import DispatchMetrics, EngineMetrics, new_registry

    free = {"bytes": 100 * GIB}
    monkeypatch.setattr(load, "available_memory", lambda: free["bytes"])
    config = EngineConfig(device="cpu", dtype="float32")
    experts = load.local_experts(demo_checkpoint, config, 1, DispatchMetrics(new_registry(), "test"))
    engine = load.load_engine(
        demo_checkpoint, config, experts, EngineMetrics(new_registry(), "test"), num_sharers=2,
        wait_for_experts=lambda: free.update(bytes=400 << 20),
    )  # fmt: skip
    assert engine.blocks.num_blocks == 100 * 1024 // 16


@pytest.mark.parametrize(
    ("fields", "hosts", "sharers"),
    [
        ({}, 1, 1),
        ({"attention_replicas": 4}, 1, 4),
        ({"attention_replicas": 4}, 3, 2),
        ({"attention_replicas": 1, "max_attention_replicas": 4}, 2, 2),
        ({"attention_replicas": 4, "gpus_per_attention_replica": 1.0}, 1, 1),
        ({"attention_replicas": 4, "gpus_per_attention_replica": 0.5}, 1, 2),
        ({"attention_replicas": 4, "attention_resource": "dense"}, 4, 4),  # one node of the four has it
    ],
)
def test_replicas_share_the_memory_of_their_machine(fields, hosts, sharers):
    nodes = [{"Alive": True, "Resources": {"CPU": 4.0}} for _ in range(hosts)]
    nodes[0]["Resources"]["dense"] = 1.0
    nodes.append({"Alive": False, "Resources": {"CPU": 4.0, "dense": 1.0}})
    assert num_sharers(ClusterConfig(model="/m", **fields), nodes) == sharers


@pytest.mark.parametrize(
    ("prompt", "asked", "context", "cache", "granted"),
    [
        (20, 8172, 8192, 5461, 5441),  # Qwen1.5-MoE-A2.7B-Chat with 1 GiB
        (20, 32748, 32768, 18724, 18704),  # Qwen2-57B-A14B
        (20, 64, 4096, 5461, 64),
        (5460, 64, 8192, 5461, 1),
    ],
)
def test_a_max_tokens_that_nobody_asked_for_is_what_fits(prompt, asked, context, cache, granted):
    made = replace(request("a", range(prompt), max_tokens=asked), max_tokens_is_default=True)
    assert fitting(made, context, cache).max_tokens == granted


def test_a_max_tokens_that_was_asked_for_is_kept_or_refused():
    assert fitting(request("a", range(20), max_tokens=100), 8192, 120).max_tokens == 100
    with pytest.raises(InvalidRequest, match="is 121, the KV cache holds 120") as refused:
        fitting(request("a", range(20), max_tokens=101), 8192, 120)
    assert refused.value.field == "max_tokens"
    with pytest.raises(InvalidRequest, match="is 121, the context has 120") as refused:
        fitting(request("a", range(20), max_tokens=101), 120, 8192)
    assert refused.value.field == "max_tokens"


def test_a_prompt_that_fills_the_cache_is_refused_by_its_own_name():
    made = replace(request("a", range(120), max_tokens=100), max_tokens_is_default=True)
    with pytest.raises(
        InvalidRequest, match=r"the prompt has 120 tokens, .* the KV cache holds 120: shorten it"
    ) as refused:
        fitting(made, 8192, 120)
    assert refused.value.field == "input"


def test_a_min_tokens_above_what_fits_is_refused_by_its_own_name():
    made = replace(request("a", range(20), max_tokens=1000, min_tokens=500), max_tokens_is_default=True)
    with pytest.raises(InvalidRequest) as refused:
        fitting(made, 8192, 120)
    assert refused.value.field == "min_tokens"


def test_an_answer_without_max_tokens_ends_where_the_cache_is_full():
    """Six blocks of 4: a prompt of 5 leaves 19 tokens."""
    engine = make_engine(num_blocks=6)
    engine.submit(replace(request("a", range(10, 15), max_tokens=995), max_tokens_is_default=True))
    tokens, reason = run_to_end(engine)["a"]
    assert (tokens, reason) == (list(range(15, 34)), "length")


def test_an_answer_that_went_on_elsewhere_ends_where_that_cache_is_full():
    """It has 21 tokens already, and this engine's cache would have given it 19."""
    engine = make_engine(num_blocks=6)
    made = replace(
        request("a", range(10, 15), max_tokens=995), max_tokens_is_default=True, num_replays=1,
        output_token_ids=tuple(range(15, 36)),
    )  # fmt: skip
    engine.submit(made)
    assert run_to_end(engine) == {"a": ([], "length")}


def test_an_llm_with_a_small_cache_answers_without_max_tokens(demo_checkpoint):
    """Three blocks of 16 tokens; the checkpoint's max_new_tokens is 64, of which 28 fit behind 20."""
    with LLM(demo_checkpoint, dtype="float32", skip_tokenizer=True, kv_cache_bytes=3 * BLOCK_BYTES) as llm:
        answer = llm.generate([list(range(20))], SamplingParams(ignore_eos=True, seed=1))[0]
        assert len(answer.token_ids) == 28
        assert answer.finish_reason == "length"
        with pytest.raises(InvalidRequest) as refused:
            llm.generate([list(range(20))], SamplingParams(max_tokens=29))
        assert refused.value.field == "max_tokens"


def test_the_start_says_what_the_smallest_cache_holds():
    def replica(num_blocks, context, **changes):
        engine = make_engine(num_blocks=num_blocks, max_model_len=context)
        return SimpleNamespace(stats=replace(engine.stats(), **changes))

    def shown(*replicas):
        return describe_cache(SimpleNamespace(replicas=replicas))

    assert shown() == ""
    assert shown(SimpleNamespace(stats=None)) == ""
    assert shown(replica(2000, 8000)) == "8,000 tokens of keys and values in each attention replica"
    assert shown(replica(2000, 8000, kv_cache_dtype="fp8")).startswith("8,000 tokens of keys and values in fp8 in each")
    assert shown(replica(2000, 8192), replica(1500, 8192)) == (
        "6,000 tokens of keys and values in each attention replica; the context has 8,192: without max_tokens an "
        "answer ends where the cache is full"
    )


def test_a_small_cache_is_said_in_one_line_at_start(demo_checkpoint, caplog):
    with LLM(demo_checkpoint, dtype="float32", skip_tokenizer=True, kv_cache_bytes=3 * BLOCK_BYTES):
        pass
    lines = [record.getMessage() for record in caplog.records if "KV cache" in record.getMessage()]
    assert lines == [
        "KV cache: 48 tokens, 0 MiB; the context has 4,096: without max_tokens an answer ends where the cache is full "
        "(kv_cache_bytes)"
    ]
