"""A model divided among ranks: who has what, what is refused, and processes that die."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from configs import BASE, BASE_DENSE, CONFIGS, DENSE_CONFIGS, PROMPTS, config, dense
from lora_tools import write_adapter

from cluster import LLM, SamplingParams
from cluster.checkpoint.made.drawn import SEED_KEY
from cluster.checkpoint.made.synthetic import write_checkpoint
from cluster.checkpoint.names import dense_shapes
from cluster.checkpoint.opening import open_checkpoint
from cluster.checkpoint.spans import spans_of
from cluster.config import EngineConfig, read_model_config
from cluster.config.tensor_parallel import Span, check_ranks, share_of
from cluster.engine.exchange import Exchange
from cluster.engine.group import Group
from cluster.engine.preflight import check_checkpoint, check_for_plan
from cluster.engine.rank_process import ChildRanks
from cluster.engine.words import INLINE
from cluster.errors import CheckpointError, SetupError, Unavailable

SIZES = ("hidden_size", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
ORDERED = config(**dict.fromkeys(SIZES, 128), quantization_config=GPTQ | {"desc_act": True})
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
has_two = torch.cuda.device_count() > 1  # NCCL takes no two processes on one
on_two_gpus = [pytest.mark.gpu, pytest.mark.skipif(not has_two, reason="needs two CUDA devices")]


def heads_of(num_heads, num_kv_heads, num_ranks):
    model = read_model_config(dense(num_attention_heads=num_heads, num_key_value_heads=num_kv_heads, head_dim=8))
    shares = [share_of(model, rank, num_ranks) for rank in range(num_ranks)]
    return [(list(share.heads), list(share.kv_heads)) for share in shares]


def test_ranks_have_whole_groups_of_heads():
    assert heads_of(4, 2, 2) == [([0, 1], [0]), ([2, 3], [1])]
    assert heads_of(6, 3, 2) == [([0, 1, 2, 3], [0, 1]), ([4, 5], [2])]


def test_several_ranks_have_a_copy_of_a_key_value_head_where_there_are_fewer():
    assert heads_of(4, 2, 4) == [([0], [0]), ([1], [0]), ([2], [1]), ([3], [1])]
    assert heads_of(4, 2, 3) == [([0, 1], [0]), ([2], [1]), ([3], [1])]
    assert heads_of(7, 1, 3) == [([0, 1, 2], [0]), ([3, 4], [0]), ([5, 6], [0])]


@pytest.mark.parametrize("raw", [*CONFIGS.values(), *DENSE_CONFIGS.values()])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_the_parts_of_a_model_are_the_whole(raw, num_ranks):
    """Each row and column is some rank's, and of one rank alone but for key/value heads that several have."""
    model = read_model_config(raw)
    whole, shares = dense_shapes(model), [share_of(model, rank, num_ranks) for rank in range(num_ranks)]
    spans, shapes = [spans_of(share, model) for share in shares], [dense_shapes(share.config) for share in shares]
    for name, shape in whole.items():
        places = []
        for of_rank, found in zip(spans, shapes, strict=True):
            assert of_rank[name].whole(found[name]) == shape if name in of_rank else found[name] == shape
            if name in of_rank:
                places += range(shape[of_rank[name].dim])[of_rank[name].index(found[name])[-1]]
        is_copied = num_ranks > model.num_key_value_heads and (".k_proj." in name or ".v_proj." in name)
        if places:
            assert sorted(set(places) if is_copied else places) == list(range(max(places) + 1))
            assert max(places) + 1 in shape


def test_uneven_inner_sizes_keep_rows_aligned():
    """2048 / 3 in units of 64: 32 units, at least 8 a rank."""
    model = read_model_config(dense(intermediate_size=2048))
    assert [len(share_of(replace(model, num_attention_heads=6), rank, 3).inner) for rank in range(3)] == [704, 704, 640]


@pytest.mark.parametrize(
    ("raw", "options", "message"),
    [
        (BASE, {"tensor_parallel_size": 5}, "tensor_parallel_size is 5, and the model has 4 query heads"),
        (dense(intermediate_size=3), {"tensor_parallel_size": 4}, "3 inner features .intermediate_size."),
        (config(shared_expert_intermediate_size=2), {"tensor_parallel_size": 3}, "2 inner features .shared"),
        (ORDERED, {"tensor_parallel_size": 2}, r"an order of each matrix's own \(desc_act\) cannot be divided"),
    ],
)
def test_what_cannot_be_divided_is_refused_in_one_line(raw, options, message):
    with pytest.raises(SetupError, match=message) as error:
        check_ranks(read_model_config(raw), EngineConfig(**options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "quantization", "size", "message"),
    [
        (
            {}, "int4", 4,
            "self_attn.o_proj.weight would begin at input 64, inside a group of 128 (quantization 'int4'): use 1 or 2 "
            "ranks, or quantization int4-64 or int4-32 or int8",
        ),
        ({"intermediate_size": 320}, "nf4", 2, "down_proj.weight would begin at input 160, inside a group of 64"),
        ({"quantization_config": GPTQ}, "none", 4, "(GPTQ): use 1 or 2 ranks, or quantization int4-64 or int4-32 or"),
        ({"quantization_config": GPTQ}, "none", 4, "int8 of the checkpoint in 16 bits"),
    ],
)  # fmt: skip
def test_a_part_that_begins_inside_a_group_is_refused_with_what_is_possible(
    tmp_path, changes, quantization, size, message
):
    raw = dense(**{"hidden_size": 128, "head_dim": 64, "intermediate_size": 512, **changes})
    (tmp_path / "config.json").write_text(json.dumps(raw))
    engine = EngineConfig(tensor_parallel_size=size, quantization=quantization)
    with pytest.raises(SetupError, match=re.escape(message)) as error:
        check_for_plan(tmp_path, engine, 1)
    assert "\n" not in str(error.value)
    check_for_plan(tmp_path, replace(engine, tensor_parallel_size=1), 1)


def test_a_start_with_more_ranks_than_heads_is_refused_before_anything_loads(tmp_path):
    write_checkpoint(tmp_path / "model", BASE_DENSE, seed=1)
    with pytest.raises(SetupError, match="the model has 4 query heads: 4 ranks can share them"):
        check_checkpoint(tmp_path / "model", EngineConfig(tensor_parallel_size=8), 1, tokenizer=False)
    with pytest.raises(SetupError, match="tensor_parallel_size"):
        EngineConfig(tensor_parallel_size=0)


@pytest.fixture
def pair(tmp_path):
    """Rank 0's end of two, and what the other hears after which it adds ones to a sum of [4, 8]."""
    heard = []

    def follow():
        group = Group(tmp_path / "meeting", 1, 2, torch.device("cpu"))
        while len(numbers := group.hear()):
            heard.append(numbers.tolist())
            group.sum(torch.ones(4, 8))

    other = threading.Thread(target=follow, daemon=True)
    other.start()
    group = Group(tmp_path / "meeting", 0, 2, torch.device("cpu"))
    yield group, heard
    group.tell(np.array([], dtype=np.int64))
    other.join(10.0)
    assert not other.is_alive()


def test_rank_0_tells_numbers_however_many(pair):
    group, heard = pair
    for count in (1, INLINE - 1, INLINE, 5 * INLINE):
        group.tell(np.arange(count))
        assert torch.equal(group.sum(torch.full((4, 8), 2.0)), torch.full((4, 8), 3.0))
    assert heard == [list(range(count)) for count in (1, INLINE - 1, INLINE, 5 * INLINE)]


def test_ranks_listen_on_loopback_and_a_strangers_bytes_change_nothing(pair):
    group, heard = pair
    mine = {os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.exists()}
    rows = [line.split() for net in ("tcp", "tcp6") for line in Path(f"/proc/self/net/{net}").read_text().splitlines()]
    listening = [row[1].split(":") for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in mine]
    assert {host for host, _ in listening} == {"0100007F"}  # 127.0.0.1
    for _, port in listening:
        with socket.create_connection(("127.0.0.1", int(port, 16)), timeout=5) as stranger:
            stranger.sendall(b"x" * 5000)
    group.tell(np.array([7]))
    assert group.sum(torch.ones(4, 8)).sum() == 64
    assert heard == [[7]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_any_size_are_the_same_bits_at_each_rank(tmp_path, dtype):
    """Three ranks, with less and more than a piece that is sent at a time."""
    shapes, found = [(1, 3), (5, 7777), (64, 4096)], {}

    def go(rank):
        group, draw = Group(tmp_path / "meeting", rank, 3, torch.device("cpu")), torch.Generator().manual_seed(rank)
        found[rank] = [group.sum(torch.randn(shape, generator=draw).to(dtype)) for shape in shapes]

    threads = [threading.Thread(target=go, args=(rank,), daemon=True) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
    draws = [torch.Generator().manual_seed(rank) for rank in range(3)]
    for place, shape in enumerate(shapes):
        exact = sum(torch.randn(shape, generator=draw).to(dtype).double() for draw in draws)
        torch.testing.assert_close(found[0][place], exact.to(dtype))
        assert all(torch.equal(found[rank][place], found[0][place]) for rank in (1, 2))


def test_a_rank_that_ends_while_it_joins_is_missed(tmp_path):
    first = Exchange(tmp_path / "meeting", 0, 2, None)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as second:
        second.connect(str(tmp_path / "meeting-0"))
    with pytest.raises(OSError, match="closed"):
        first.connect()


def test_a_rank_that_hangs_or_ends_is_missed(tmp_path):
    """Rank 0 waits for a silent one as long as it has patience for; a closed connection needs none."""
    first, second = Exchange(tmp_path / "meeting", 0, 2, 0.05), Exchange(tmp_path / "meeting", 1, 2, None)
    joining = threading.Thread(target=second.connect)
    joining.start()
    first.connect()
    joining.join(10.0)
    with pytest.raises(TimeoutError, match="sends nothing"):
        first.sum(torch.ones(3))
    first.close()
    with pytest.raises(OSError, match="Broken pipe"):
        second.sum(torch.ones(3))
    second.close()


def test_a_drawn_tensor_is_the_same_in_parts(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dense() | {SEED_KEY: 1}))
    checkpoint, name = open_checkpoint(tmp_path), "model.layers.0.mlp.down_proj.weight"
    whole, part = torch.empty(32, 48), torch.empty(32, 20)
    checkpoint.load({name: whole})
    checkpoint.load({name: part}, spans={name: Span(1, 28, 48)})
    assert torch.equal(part, whole[:, 28:])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_two_gpus)])
def test_an_llm_with_ranks_of_its_own_answers_until_one_dies(tmp_path, device):
    """Joined by gloo, or NCCL; the tokens are those of one process, which parity tests compare with transformers."""
    write_checkpoint(tmp_path / "model", BASE, seed=1)
    draw, size = torch.Generator().manual_seed(3), BASE["hidden_size"]
    changes = {f"model.layers.{n}.self_attn.o_proj": torch.randn(2, 2, size, generator=draw) for n in range(3)}
    pairs = {name: (a, b.T) for name, (a, b) in changes.items()}
    adapter = write_adapter(tmp_path / "adapter", pairs, layers_to_transform=[0, 1, 2])
    options = {"device": device, "dtype": "float32", "skip_tokenizer": True, "kv_cache_bytes": 1 << 20}
    with LLM(tmp_path / "model", **options) as llm:
        alone = [output.token_ids for output in llm.generate(PROMPTS, GREEDY)]
        llm.load_adapter("a", adapter)
        adapted = [output.token_ids for output in llm.generate(PROMPTS, GREEDY, adapter="a")]
    assert adapted != alone
    threads = torch.get_num_threads()
    with LLM(tmp_path / "model", **options, tensor_parallel_size=2) as llm:
        llm.load_adapter("a", adapter)
        assert [output.token_ids for output in llm.generate(PROMPTS, GREEDY, adapter="a")] == adapted
        [child] = llm._ranks._children
        assert [output.token_ids for output in llm.generate(PROMPTS, GREEDY)] == alone
        child.kill()
        child.wait()
        with pytest.raises(Unavailable, match="a process of a model that 2 share is gone"):
            llm.generate(PROMPTS, GREEDY)
    assert llm._ranks is None
    assert torch.get_num_threads() == threads


@pytest.mark.slow
def test_a_rank_that_cannot_load_ends_the_start_with_its_words(tmp_path):
    ranks = ChildRanks(str(tmp_path / "nothing"), EngineConfig(tensor_parallel_size=2), on_cuda=False)
    try:
        with pytest.raises(CheckpointError, match="nothing"):
            ranks.join(torch.device("cpu"))
    finally:
        ranks.close()


@pytest.mark.slow
def test_ranks_end_with_the_process_that_has_them(tmp_path):
    write_checkpoint(tmp_path / "model", BASE, seed=1)
    script = f"""
import os
from cluster import LLM
options = dict(device="cpu", skip_tokenizer=True, kv_cache_bytes=1 << 20)
llm = LLM({str(tmp_path / "model")!r}, tensor_parallel_size=2, **options)
print(llm._ranks._children[0].pid, flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{int(done.stdout)}").exists():
        assert time.monotonic() < deadline, "the rank goes on"
        time.sleep(0.05)
