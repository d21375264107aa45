"""The bytes that `moe-cluster plan` gives each process, against all tensors that its weights really hold."""

import gc
import json
import subprocess
import sys
import types

import pytest
import torch
from configs import CONFIGS, DENSE_CONFIGS

from cluster.checkpoint.made.synthetic import write_checkpoint
from cluster.checkpoint.reader import CheckpointReader
from cluster.cli import main
from cluster.experts.placement import plan_evenly
from cluster.experts.shard import ExpertShard
from cluster.model.kv_cache import KVCache
from cluster.model.registry import load_model

MODELS = {
    "moe, untied": CONFIGS["released key style, 60 experts"],
    "moe, tied": CONFIGS["tied embeddings, heads wider than hidden"],
    "moe, some layers dense": CONFIGS["every second layer sparse, a dense one named"],
    "moe, no bias": CONFIGS["top-k weights that sum to one, MHA, no bias"],
    "moe without a sparse layer": DENSE_CONFIGS["no layer sparse"],
    "dense, untied": DENSE_CONFIGS["qwen2, released key style"],
    "dense, tied": DENSE_CONFIGS["qwen2, new key style, tied embeddings, MHA"],
    "dense, some layers slide": DENSE_CONFIGS["qwen2, sliding window by max_window_layers"],
}
MODELS |= {
    f"{family} with {head}": MODELS[f"{family}, untied"] | {"architectures": [f"{name}{head}"], "num_labels": 3}
    for family, name in (("moe", "Qwen2Moe"), ("dense", "Qwen2"))
    for head in ("Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
}
CPU = torch.device("cpu")
# Reached from any object, and by them the whole program.
BEYOND = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.FrameType)


def held_bytes(*roots):
    """Bytes of all tensors of numbers that can be reached, memory that several share once. Tensors of integers are the
    addresses and places of weights, some bytes for each."""
    storages, seen, waiting = {}, set(), list(roots)
    while waiting:
        found = waiting.pop()
        if id(found) in seen or isinstance(found, BEYOND):
            continue
        seen.add(id(found))
        if isinstance(found, torch.Tensor) and found.is_floating_point():
            size = found.numel() * found.itemsize if found.is_mkldnn else found.untyped_storage().nbytes()
            storages[id(found) if found.is_mkldnn else found.untyped_storage().data_ptr()] = size
        waiting += gc.get_referents(found)
    return sum(storages.values())


def planned(model_dir, dtype, num_shards, capsys):
    assert main(["plan", str(model_dir), "--json", "--dtype", dtype, "--shards", str(num_shards)]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory):
    made = {name: tmp_path_factory.mktemp("held") / "model" for name in MODELS}
    for name, model_dir in made.items():
        write_checkpoint(model_dir, MODELS[name], seed=1)
    return made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_replica_and_each_shard_hold_what_the_plan_says(name, dtype, model_dirs, capsys):
    plan = planned(model_dirs[name], dtype, 7, capsys)
    reader, torch_dtype = CheckpointReader(model_dirs[name]), getattr(torch, dtype)
    model = load_model(reader, dtype=torch_dtype, device=CPU)
    del model.rotary  # computed from the config, some KB, no weights
    assert held_bytes(model) == plan["attention_replica_bytes"]
    slices = plan_evenly(reader.config.sparse_layers, reader.config.num_experts, len(plan["expert_shards"])).slices
    for shard_id, experts in enumerate(slices):
        shard = ExpertShard(shard_id, reader.config, dtype=torch_dtype, device=CPU)
        shard.load(reader, experts)
        weights = [layer.weights for layer in shard.layers.values()]
        assert held_bytes(*weights) == plan["expert_shards"][shard_id]["bytes"]
    together = plan["attention_replica_bytes"] + sum(shard["bytes"] for shard in plan["expert_shards"])
    assert together == plan["parameters"] * torch_dtype.itemsize


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["moe, untied", "dense, tied", "dense, some layers slide"])
def test_a_cache_holds_as_many_bytes_a_token_as_the_plan_says(name, dtype, model_dirs, capsys):
    config, num_blocks = CheckpointReader(model_dirs[name]).config, 5
    counts = [num_blocks] * len(config.layer_groups)
    cache = KVCache(config, num_blocks=counts, block_size=16, dtype=getattr(torch, dtype), device=CPU)
    per_token = planned(model_dirs[name], dtype, 2, capsys)["kv_bytes_per_token"]
    assert held_bytes(cache) == (num_blocks + 1) * 16 * per_token  # one block is for places without a token


PROCESS = """
import ctypes, gc, re, sys, torch
from pathlib import Path
from cluster.checkpoint.reader import CheckpointReader
from cluster.experts.placement import plan_evenly
from cluster.experts.shard import ExpertShard
from cluster.model.registry import load_model

def anonymous():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def loaded(model_dir, dtype):
    reader, options = CheckpointReader(model_dir), {"dtype": dtype, "device": torch.device("cpu")}
    before = anonymous()
    model = load_model(reader, **options)
    between = anonymous()
    shard = ExpertShard(0, reader.config, **options)
    shard.load(reader, plan_evenly(reader.config.sparse_layers, reader.config.num_experts, 1).slices[0])
    return between - before, anonymous() - between

loaded(sys.argv[1], torch.float32)  # what the first load brings along stays: libraries, buffers
print(*loaded(sys.argv[2], getattr(torch, sys.argv[3])))
"""


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_the_kernel_counts_as_many_bytes_of_a_process(dtype, model_dirs, tmp_path, capsys):
    """Within 5 % or 4 MB: no second copy stays, in whatever form the weights are kept."""
    larger = {"vocab_size": 20_000, "hidden_size": 512, "num_experts": 12, "moe_intermediate_size": 512}
    write_checkpoint(tmp_path / "model", MODELS["moe, untied"] | larger, seed=1)
    plan = planned(tmp_path / "model", dtype, 1, capsys)
    command = [sys.executable, "-c", PROCESS, str(model_dirs["moe, untied"]), str(tmp_path / "model"), dtype]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout.split()
    expected = [plan["attention_replica_bytes"], plan["expert_shards"][0]["bytes"]]
    assert min(expected) > 40_000_000
    assert [int(text) for text in found] == [pytest.approx(each, rel=0.05, abs=4_000_000) for each in expected]
