"""Weights that are rounded while a checkpoint is loaded: which, what they take, and that answers stay near."""

from pathlib import Path

import pytest
import torch
from weight_tools import held_bytes

from cluster import LLM, SamplingParams
from cluster.bench.spec import SystemSpec
from cluster.checkpoint.made.synthetic import write_checkpoint
from cluster.checkpoint.reader import CheckpointReader
from cluster.checkpoint.sizes import sizes_of
from cluster.config import EngineConfig
from cluster.config.awq import Awq
from cluster.config.quantization import QUANTIZATIONS, stored_quantization
from cluster.config.tensor_parallel import shares_of
from cluster.errors import SetupError
from cluster.experts.shard import ExpertShard
from cluster.kernels import gpu, nf4
from cluster.kernels.stored import quantization_on
from cluster.model.layers.linear import Linear
from cluster.model.registry import load_model

RAW = {
    "model_type": "qwen2_moe", "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96, "moe_intermediate_size": 40, "num_experts": 6,
    "shared_expert_intermediate_size": 80, "num_experts_per_tok": 2, "max_position_embeddings": 128,
    "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantization")
    write_checkpoint(folder, RAW, seed=1)
    return folder


@pytest.mark.parametrize(("name", "head"), [("int4", False), ("int8+lm_head", True)])
def test_attention_and_dense_layers_are_rounded_and_no_router(folder, name, head):
    """A weight of the checkpoint is 2 bytes; of 64 inputs a rounded row is 16 or 32 bytes of head and 64 of weights."""
    model = load_model(CheckpointReader(folder), dtype=torch.bfloat16, device=CPU, quantization=QUANTIZATIONS[name])
    forms = {
        path.removeprefix("model."): type(module.weight).__name__
        for path, module in model.named_modules()
        if isinstance(module, Linear)
    }
    rounded = {path for path, form in forms.items() if form == "QuantizedWeight"}
    parts = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.shared_expert.gate_up_proj", "mlp.shared_expert.down_proj")
    expected = {f"layers.{layer}.{part}" for layer in range(2) for part in parts}
    assert rounded == expected | ({"lm_head"} if head else set())
    assert {path for path in forms if "gate" in path} - rounded == {
        f"layers.{layer}.mlp.shared_expert_gate" for layer in range(2)
    }


def test_a_shard_counts_the_bytes_that_its_rounded_experts_take(folder):
    """int8: 80 rows of 64 inputs in 16 + 64 bytes and 64 rows of 40 inputs in 16 + 64, for one expert."""
    reader = CheckpointReader(folder)
    shard = ExpertShard(0, reader.config, dtype=torch.bfloat16, device=CPU, quantization=QUANTIZATIONS["int8"])
    shard.load(reader, {0: [3]})
    assert shard.num_bytes == (80 + 64) * (16 + 64)


@pytest.mark.parametrize("name", ["int8", "int4-32"])
def test_a_shard_of_rounded_experts_gives_nearly_the_same_rows(folder, name):
    reader = CheckpointReader(folder)
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    ids, weights = torch.arange(18).view(9, 2) % 6, torch.full((9, 2), 0.5)
    found = []
    for quantization in (None, QUANTIZATIONS[name]):
        shard = ExpertShard(0, reader.config, dtype=torch.bfloat16, device=CPU, quantization=quantization)
        shard.load(reader, {0: [5, 0, 2, 1]})
        shard.load(reader, {0: list(range(6))})  # four move to other places, two are read
        found.append(shard.forward(0, x, ids, weights).double())
    error = (found[1] - found[0]).norm() / found[0].norm()
    assert 0 < error < (0.03 if name == "int8" else 0.2)


def best(folder, **quantized):
    with LLM(folder, skip_tokenizer=True, kv_cache_bytes=1 << 22, max_model_len=64, **quantized) as llm:
        [output] = llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=1, logprobs=5))
    return dict(output.logprobs[0].top)


def test_an_offline_model_is_rounded_as_asked_its_experts_otherwise(folder):
    exact = best(folder)
    found = [
        best(folder, quantization="int8+lm_head"),
        best(folder, quantization="int8+lm_head", expert_quantization="none"),
        best(folder, expert_quantization="int4-64-zeros"),
    ]
    assert len({tuple(some.values()) for some in (exact, *found)}) == 4
    assert all(len(set(some) & set(exact)) >= 2 for some in found)


@pytest.mark.parametrize("name", ["int8+lm_head", "int4-32-zeros", "nf4+lm_head"])
def test_a_rank_holds_what_a_plan_says(tmp_path, name):
    write_checkpoint(tmp_path, {**RAW, "head_dim": 32, "shared_expert_intermediate_size": 1280}, seed=1)
    reader = CheckpointReader(tmp_path)
    for share in shares_of(reader.config, 2):
        sizes = sizes_of(share.config, "bfloat16", quantization=name)
        options = {"dtype": torch.bfloat16, "device": CPU, "quantization": QUANTIZATIONS[name]}
        assert sizes.dense_bytes == held_bytes(load_model(reader, share=share, **options))


@pytest.mark.parametrize("name", ["int8", "int4", "int4-32-zeros+lm_head"])
def test_the_sizes_of_a_plan_are_those_of_the_loaded_weights(folder, name):
    reader = CheckpointReader(folder)
    sizes = sizes_of(reader.config, "bfloat16", quantization=name, expert_quantization=name)
    model = load_model(reader, dtype=torch.bfloat16, device=CPU, quantization=QUANTIZATIONS[name])
    shard = ExpertShard(0, reader.config, dtype=torch.bfloat16, device=CPU, quantization=QUANTIZATIONS[name])
    shard.load(reader, {0: [3, 4]})
    assert sizes.expert_bytes == shard.num_bytes // 2
    assert sizes.dense_bytes == held_bytes(model)
    assert sizes.num_parameters == sizes_of(reader.config, "float32").num_parameters


def test_a_name_or_a_device_that_cannot_be_is_refused(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(gpu, "available", lambda: True)
    assert quantization_on("int4", cuda) == quantization_on("int4", CPU) == QUANTIZATIONS["int4"]
    monkeypatch.setattr(gpu, "available", lambda: False)  # no Triton
    assert quantization_on("none", cuda) is None
    assert quantization_on("int4", CPU).group_size == 128
    for name, stored in (("int4", None), ("none", stored_quantization(Awq(128)))):
        with pytest.raises(SetupError, match="weights in 4 bits need Triton on a GPU, and it is not installed"):
            quantization_on(name, cuda, stored)
    for field in ("quantization", "expert_quantization"):
        with pytest.raises(SetupError, match=f"{field} is 'int3'.*int8, int4"):
            EngineConfig(**{field: "int3"})


def test_nf4_is_loaded_by_its_parts_and_counted(tmp_path):
    """Query, key and value are rounded each by itself, and a plan counts what is held."""
    raw = {**RAW, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 128, "intermediate_size": 128}
    write_checkpoint(tmp_path, raw, seed=1)
    reader = CheckpointReader(tmp_path)
    sizes = sizes_of(reader.config, "bfloat16", quantization="nf4", expert_quantization="nf4")
    model = load_model(reader, dtype=torch.bfloat16, device=CPU, quantization=QUANTIZATIONS["nf4"])
    shard = ExpertShard(0, reader.config, dtype=torch.bfloat16, device=CPU, quantization=QUANTIZATIONS["nf4"])
    shard.load(reader, {0: [3, 4]})
    assert sizes.expert_bytes == shard.num_bytes // 2
    names = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv"]
    matrices = {name: torch.empty(64 if "q_" in name else 32, 64) for name in names}
    reader.load(matrices)
    expected = torch.cat([nf4.dequantize(nf4.quantize(matrix)) for matrix in matrices.values()])
    assert torch.equal(model.get_submodule("model.layers.0.self_attn.qkv_proj").weight.dequantized(), expected)
    exact = best(tmp_path)
    assert len(set(best(tmp_path, quantization="nf4", expert_quantization="nf4")) & set(exact)) >= 2


def test_nf4_wants_whole_blocks(folder):
    with pytest.raises(
        SetupError, match=r"shared_expert.down_proj.weight has 80 inputs, which its blocks of 64 do not"
    ):
        best(folder, quantization="nf4")
    with pytest.raises(SetupError, match=r"experts.0.down_proj.weight has 40 inputs.*: use int4"):
        best(folder, expert_quantization="nf4")


def test_a_measured_system_is_named_by_its_quantization():
    spec = SystemSpec(kind="local", model_dir=Path("m"), dtype="bfloat16", num_shards=1, quantization="int4+lm_head")
    assert spec.name == "local, int4+lm_head"
