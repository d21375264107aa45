"""Checkpoints in GPTQ's form: kept in 4 bits, with the logits of transformers on the numbers that they mean."""

import json

import pytest
import torch
from gptq_tools import quantization_config, rounded, write_pair
from safetensors.torch import load_file, save_file
from stored_tools import DENSE, MOE, assert_means, offline
from weight_tools import held_bytes

from cluster.checkpoint.reader import CheckpointReader
from cluster.checkpoint.sizes import sizes_of
from cluster.config import read_model_config
from cluster.config.gptq import Gptq
from cluster.config.quantization import stored_quantization
from cluster.errors import CheckpointError, SetupError
from cluster.experts.shard import ExpertShard
from cluster.kernels.stored import quantized_weight
from cluster.model.registry import load_model


@pytest.mark.parametrize("raw", [MOE, DENSE], ids=["qwen2_moe", "qwen2"])
@pytest.mark.parametrize(
    "form",
    [
        {},
        {"sym": False},
        {"sym": False, "is_v1": False},
        {"group_size": -1, "is_v1": False},
        {"sym": False, "desc_act": True},
    ],
    ids=str,
)
def test_logits_and_tokens_are_those_of_the_numbers_that_it_means(tmp_path, raw, form):
    gptq, plain = write_pair(tmp_path, raw, **form)
    assert_means(gptq, plain)


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("is_v1", [True, False])
def test_a_matrix_is_kept_as_it_is(group_size, sym, is_v1):
    """Two matrices one above another, bit for bit what the form means, in memory within a tenth of the arithmetic."""
    num_inputs = 1408 if group_size in (64, 128) else 96
    draw = torch.Generator().manual_seed(1)
    parts = {"a": 16, "b": 40}
    stored = {
        name: rounded(torch.randn(n, num_inputs, generator=draw), group_size, sym=sym, is_v1=is_v1)
        for name, n in parts.items()
    }
    quantization = stored_quantization(Gptq(max(0, group_size), int(is_v1), sym))
    weight = quantized_weight(56, num_inputs, quantization=quantization, dtype=torch.float16)
    staging = torch.empty(weight.staging_bytes, dtype=torch.uint8)
    targets = weight.targets(parts, staging)
    assert set(targets) == {f"{name}.{end}" for name in parts for end in ("qweight", "qzeros", "scales", "g_idx")}
    for name, (tensors, _) in stored.items():
        for end in ("qweight", "qzeros", "scales", "g_idx"):
            targets[f"{name}.{end}"].copy_(tensors[end])
    weight.settle()
    assert torch.equal(weight.dequantized(), torch.cat([means for _, means in stored.values()]))


def test_its_memory_is_that_of_4_bits():
    """A matrix of Qwen1.5-MoE-A2.7B's shape: 4 bits a number and 2 bytes a group."""
    quantization = stored_quantization(Gptq(128, 1))
    weight = quantized_weight(2816, 2048, quantization=quantization, dtype=torch.float16)
    assert weight.nbytes <= 1.1 * 2816 * (2048 / 2 + 2048 / 128 * 2)


def test_its_sizes_are_those_of_the_model():
    """Parameters are counted as of the plain model; bytes are what processes hold."""
    sizes = {"hidden_size": 2048, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 1408}
    model = {**MOE, **sizes}
    rounded_one, plain = (
        sizes_of(read_model_config({**model, **changes}), "float16")
        for changes in ({"quantization_config": quantization_config()}, {})
    )
    assert rounded_one.num_parameters == plain.num_parameters
    assert rounded_one.num_active_parameters == plain.num_active_parameters
    assert plain.expert_bytes / 4 < rounded_one.expert_bytes < plain.expert_bytes / 3.5
    assert rounded_one.dense_bytes < plain.dense_bytes


def test_an_order_of_inputs_is_counted_as_it_is_held(tmp_path):
    reader = CheckpointReader(write_pair(tmp_path, MOE, desc_act=True)[0])
    options = {"dtype": torch.float32, "device": torch.device("cpu")}
    model = load_model(reader, quantization=reader.config.stored, **options)
    shard = ExpertShard(0, reader.config, quantization=reader.config.stored_experts, **options)
    shard.load(reader, {0: [3, 4]})
    sizes = sizes_of(reader.config, "float32")
    assert (sizes.dense_bytes, 2 * sizes.expert_bytes) == (held_bytes(model), shard.num_bytes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"quant_method": "bitnet"}, "quant_method is 'bitnet': served are gptq, awq, compressed-tensors"),
        ({"checkpoint_format": ["gptq"]}, "checkpoint_format is ['gptq']"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin', served are gptq, gptq_v2"),
        ({"bits": 3}, "bits is 3, GPTQ is served with 4"),
        ({"bits": None}, "bits is missing"),
        ({"group_size": 16}, "group_size is 16, one of 32, 64, 128 or -1"),
        ({"group_size": "x"}, "group_size is 'x'"),
        ({"sym": 3}, "sym is 3"),
        ({"desc_act": 1}, "desc_act is 1"),
    ],
)
def test_another_form_is_refused(changes, named):
    with pytest.raises(CheckpointError) as refusal:
        read_model_config({**MOE, "quantization_config": quantization_config(**changes)})
    assert named in str(refusal.value)
    assert "config.json" in str(refusal.value)


def test_what_cannot_be_served_is_refused_in_one_line(tmp_path):
    gptq, _ = write_pair(tmp_path, MOE)
    with pytest.raises(SetupError, match="its weights are in 4 bits already"):
        offline(gptq, quantization="int8")
    with pytest.raises(SetupError, match="its weights are in 4 bits already"):
        offline(gptq, expert_quantization="int4")
    file = gptq / "model.safetensors"
    tensors = load_file(file)
    layer = "model.layers.0.mlp.experts.1.gate_proj"

    def refused(**changed):
        save_file(tensors | {f"{layer}.{end}": tensor for end, tensor in changed.items()}, file)
        with pytest.raises(CheckpointError) as refusal:
            offline(gptq)
        assert "\n" not in str(refusal.value)
        return str(refusal.value)

    assert f"{layer}.g_idx has its inputs in another order" in refused(g_idx=tensors[f"{layer}.g_idx"].flip(0))
    assert f"{layer}.qzeros has other zeros" in refused(qzeros=tensors[f"{layer}.qzeros"] + 1)
    scales = tensors[f"{layer}.scales"].clone()
    scales[0, 0] = torch.inf
    assert f"{layer} has scales that are not finite" in refused(scales=scales)
    assert f"{layer}.bias is not zero" in refused(bias=torch.ones(32).half())
    assert "has dtype F32, I32 is served" in refused(qweight=tensors[f"{layer}.qweight"].float())
    wrong = torch.zeros_like(tensors[f"{layer}.g_idx"])
    assert f"{layer}.g_idx does not give each group its inputs" in refused(g_idx=wrong)
    assert "implies [8, 32]" in refused(qweight=tensors[f"{layer}.qweight"][:4])
    config = json.loads((gptq / "config.json").read_text())
    config["quantization_config"]["group_size"] = 128
    (gptq / "config.json").write_text(json.dumps(config))
    assert "which GPTQ's groups of 128 inputs" in refused()
