"""Checkpoints in AWQ's and compressed-tensors' forms: kept in their bits, with transformers' logits on the numbers that
they mean. `stored_tools` packs them number by number; tests/data/packed/ has two layers that GPTQModel packed, and
`test_oracles.py` those of compressed-tensors itself. GPTQModel 7.7 wants torch 2.14, so it does not install here."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from stored_tools import (
    DENSE,
    GREEDY,
    MOE,
    PROMPTS,
    assert_means,
    awq_config,
    awq_layer,
    offline,
    packed_config,
    packed_layer,
    write_awq,
    write_packed,
)
from weight_tools import settled

from cluster.checkpoint.sizes import sizes_of
from cluster.config import read_model_config
from cluster.config.awq import Awq
from cluster.config.gptq import Gptq
from cluster.config.packed import Packed
from cluster.config.quantization import stored_quantization
from cluster.errors import CheckpointError, SetupError
from cluster.kernels.stored import quantized_weight

GPTQMODEL = Path(__file__).parents[1] / "data" / "packed" / "gptqmodel.safetensors"
WRITERS = {
    "awq": write_awq,
    "awq without attention": partial(write_awq, kept=("self_attn", "gate")),
    "awq without experts": partial(write_awq, kept=("experts",)),
    "8 bits": write_packed,
    "4 bits with zeros": partial(write_packed, num_bits=4, group_size=32, symmetric=False),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_logits_and_tokens_are_those_of_the_numbers_that_it_means(tmp_path, write):
    stored, plain = write(tmp_path, MOE)
    assert_means(stored, plain)


@pytest.mark.parametrize("write", [write_awq, write_packed], ids=["awq", "8 bits"])
def test_a_dense_model_is_read_too(tmp_path, write):
    stored, plain = write(tmp_path, DENSE)
    with offline(stored) as llm, offline(plain) as ours:
        torch.testing.assert_close(llm.logits(PROMPTS[0]), ours.logits(PROMPTS[0]), atol=2e-3, rtol=0)


@settings(max_examples=20, deadline=None)
@given(
    groups=st.integers(1, 12), size=st.sampled_from([32, 64, 128, -1]), sizes=st.lists(st.integers(1, 6), min_size=1,
    max_size=3), seed=st.integers(0, 99),
)  # fmt: skip
def test_an_awq_matrix_is_kept_as_it_is(groups, size, sizes, seed):
    """Up to three one above another, bit for bit what the form means."""
    draw = torch.Generator().manual_seed(seed)
    num_inputs = groups * (32 if size == -1 else size)
    matrices = {f"m{i}": torch.randn(8 * n, num_inputs, generator=draw) for i, n in enumerate(sizes)}
    made = {name: awq_layer(matrix, size) for name, matrix in matrices.items()}
    weight = settled(Awq(max(0, size)), matrices, {name: tensors for name, (tensors, _) in made.items()})
    assert torch.equal(weight.dequantized(), torch.cat([means for _, means in made.values()]))


@settings(max_examples=20, deadline=None)
@given(
    bits=st.sampled_from([4, 8]), groups=st.integers(1, 12), size=st.sampled_from([None, 32, 64, 128]),
    symmetric=st.booleans(), sizes=st.lists(st.integers(1, 6), min_size=1, max_size=3), seed=st.integers(0, 99),
)  # fmt: skip
@example(bits=4, groups=2, size=32, symmetric=False, sizes=[1], seed=0)  # its zeros fill one column of words
def test_a_packed_matrix_is_kept_as_it_is(bits, groups, size, symmetric, sizes, seed):
    symmetric |= bits == 8
    draw = torch.Generator().manual_seed(seed)
    num_inputs = groups * (size or 13)  # 13 numbers fill no word
    matrices = {f"m{i}": torch.randn(8 * n, num_inputs, generator=draw) for i, n in enumerate(sizes)}
    made = {name: packed_layer(matrix, bits, size, symmetric) for name, matrix in matrices.items()}
    form = Packed(bits, size or 0, symmetric)
    weight = settled(form, matrices, {name: tensors for name, (tensors, _) in made.items()})
    expected = torch.cat([means for _, means in made.values()])
    torch.testing.assert_close(weight.dequantized(), expected, rtol=2**-10 if size or bits == 4 else 1e-7, atol=1e-6)


@pytest.mark.parametrize("zero_shift", [0, 1])
def test_a_layer_that_gptqmodel_packed_means_the_same(zero_shift):
    """Version 1 of zeros is version 2 less one in each 4 bits: none of these zeros is 0."""
    tensors = load_file(GPTQMODEL)
    layer = {end: tensors[f"gptq.{end}"] for end in ("qweight", "qzeros", "scales", "g_idx")}
    layer["qzeros"] = layer["qzeros"] - zero_shift * 0x11111111
    weight = settled(Gptq(32, zero_shift, is_symmetric=False), {"w": tensors["gptq.means"]}, {"w": layer})
    torch.testing.assert_close(weight.dequantized(), tensors["gptq.means"], rtol=1e-6, atol=0)


def test_a_layer_that_gptqmodel_packed_for_awq_means_the_same():
    tensors = load_file(GPTQMODEL)
    layer = {end: tensors[f"awq.{end}"] for end in ("qweight", "qzeros", "scales")}
    weight = settled(Awq(32), {"w": tensors["awq.means"]}, {"w": layer})
    torch.testing.assert_close(weight.dequantized(), tensors["awq.means"], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("form", "bytes_a_group"), [(Awq(128), 3), (Packed(8, 0), 0), (Packed(4, 128), 2)], ids=["awq", "8 bits", "4 bits"]
)
def test_its_memory_is_that_of_its_bits(form, bytes_a_group):
    """A matrix of Qwen1.5-MoE-A2.7B's shape: its numbers, and for each group a scale of 2 bytes and a zero of one."""
    weight = quantized_weight(2816, 2048, quantization=stored_quantization(form), dtype=torch.float16)
    assert weight.nbytes <= 1.1 * 2816 * (2048 * form.num_bits / 8 + 2048 / 128 * bytes_a_group)


def test_its_sizes_are_those_of_the_model():
    """Experts that are kept plain count as such."""
    model = {**MOE, "hidden_size": 2048, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 1408}
    plain = sizes_of(read_model_config({**model, "intermediate_size": 5632}), "float16")

    def sizes(method):
        config = read_model_config({**model, "intermediate_size": 5632, "quantization_config": method})
        found = sizes_of(config, "float16")
        assert found.num_parameters == plain.num_parameters
        return found

    assert plain.expert_bytes / 4 < sizes(awq_config()).expert_bytes < plain.expert_bytes / 3.5
    assert plain.expert_bytes / 2 < sizes(packed_config()).expert_bytes < plain.expert_bytes / 1.9
    without = sizes(awq_config(modules_to_not_convert=["experts"]))
    assert without.expert_bytes == plain.expert_bytes
    assert without.dense_bytes < plain.dense_bytes


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"version": "gemv"}, "version is 'gemv', AWQ is served as gemm alone"),
        ({"version": 3}, "version is 3"),
        ({"version": None, "format": "llm-awq"}, "version is 'llm-awq'"),
        ({"bits": 8}, "bits is 8, AWQ is served with 4"),
        ({"bits": "4"}, "bits is '4'"),
        ({"group_size": 48}, "group_size is 48, one of 32, 64, 128 or -1"),
        ({"group_size": 128}, "which AWQ's groups of 128 inputs"),
        ({"zero_point": False}, "zero_point is false"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is 'lm_head', a list of names"),
        ({"modules_to_not_convert": ["q_proj"]}, "query, key and value, gate and up, and all routed experts"),
        ({"modules_to_not_convert": ["experts.3"]}, "mlp.experts.0.gate_proj is in 4 bits and"),
    ],
)
def test_another_form_of_awq_is_refused(changes, named):
    refused({**awq_config(group_size=32), **changes}, named)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"format": "int-quantized"}, "format is 'int-quantized', pack-quantized is served"),
        ({"format": None}, "format is None"),
        ({"input_activations": {"num_bits": 8}}, "input_activations is {'num_bits': 8}: served are weights alone"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is"),
        ({"transform_config": {"config_groups": {}}}, "transform_config is"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is 'sparse-24-bitmask'"),
        ({"quantization_status": "frozen"}, "quantization_status is 'frozen'"),
        ({"config_groups": {}}, "config_groups has 0 groups"),
        ({"config_groups": None}, "config_groups is missing"),
        ({"config_groups": {"group_0": 3}}, "group_0 is no object"),
        ({"targets": ["re:.*self_attn.*"]}, "targets is ['re:.*self_attn.*'], ['Linear'] is served"),
        ({"num_bits": 3}, "num_bits is 3"),
        ({"type": "float"}, "type is 'float'"),
        ({"symmetric": False}, "symmetric is False, with 8 bits True is served"),
        ({"strategy": "tensor"}, "strategy is 'tensor'"),
        ({"actorder": "group"}, "actorder is 'group'"),
        ({"dynamic": True}, "dynamic is True"),
        ({"ignore": [3]}, "ignore is [3], a list of names"),
        ({"ignore": ["re:(a"]}, "ignore has 're:(a', which is no pattern"),
        ({"ignore": ["re:(a*)*b"]}, "none of a group: name the layers"),
        ({"ignore": ["model.layers.1.self_attn.k_proj"]}, "query, key and value, gate and up"),
    ],
)
def test_another_form_of_compressed_tensors_is_refused(changes, named):
    refused(packed_config(**changes), named)


def refused(method, named):
    with pytest.raises(CheckpointError) as refusal:
        read_model_config({**MOE, "quantization_config": method})
    assert named in str(refusal.value)
    assert "config.json" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_experts_that_are_plain_may_be_rounded_while_they_are_loaded(tmp_path):
    stored, _ = write_awq(tmp_path, MOE, kept=("experts",))
    with offline(stored, expert_quantization="int8") as llm:
        assert len(llm.generate(PROMPTS, GREEDY)) == 2
    with pytest.raises(SetupError, match="its weights are in 4 bits already"):
        offline(stored, quantization="int8")


def test_files_that_do_not_fit_are_refused_in_one_line(tmp_path):
    def refusal(folder, tensors, **changed):
        save_file(tensors | {f"{layer}.{end}": tensor for end, tensor in changed.items()}, folder / "model.safetensors")
        with pytest.raises(CheckpointError) as refusal:
            offline(folder)
        assert "\n" not in str(refusal.value)
        return str(refusal.value)

    layer = "model.layers.0.mlp.experts.1.gate_proj"
    awq, _ = write_awq(tmp_path / "awq", MOE)
    tensors = load_file(awq / "model.safetensors")
    words, scales = tensors[f"{layer}.qweight"], tensors[f"{layer}.scales"]
    assert "implies [64, 4]" in refusal(awq, tensors, qweight=words[:32].contiguous())
    assert "has dtype I64, I32 is served" in refusal(awq, tensors, qweight=words.long())
    assert "has dtype I32, F64, F32, BF16, F16 are served" in refusal(awq, tensors, scales=scales.int())
    assert f"{layer} has scales that are not finite" in refusal(awq, tensors, scales=scales * torch.inf)
    assert f"{layer}.g_idx is not expected" in refusal(awq, tensors, g_idx=torch.zeros(64, dtype=torch.int32))
    without = {name: tensor for name, tensor in tensors.items() if name != f"{layer}.qzeros"}
    assert f"{layer}.qzeros is missing" in refusal(awq, without)
    packed, _ = write_packed(tmp_path / "packed", MOE)
    tensors = load_file(packed / "model.safetensors")
    shape = f"{layer}.weight_shape is [32, 65], config.json implies [32, 64]"
    assert shape in refusal(packed, tensors, weight_shape=torch.tensor([32, 65]))
    assert "has dtype F32, I64, I32 are served" in refusal(packed, tensors, weight_shape=torch.tensor([32.0, 64.0]))
    assert "implies [32, 1]" in refusal(packed, tensors, weight_scale=torch.ones(32, 2))
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["ignore"] = []
    (packed / "config.json").write_text(json.dumps(config))
    assert "lm_head.weight_packed" in refusal(packed, tensors)
