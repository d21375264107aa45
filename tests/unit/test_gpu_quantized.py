"""The GPU's kernels for weights in 8 and 4 bits against products with the numbers that these mean."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gptq_tools import rounded as rounded_by_gptq
from gptq_tools import write_pair
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_tools import MOE, offline, packed_layer
from triton_tools import DEVICE, DTYPES, gpu_kernels
from weight_tools import filled, settled

from cluster.checkpoint.made.synthetic import write_checkpoint
from cluster.checkpoint.reader import CheckpointReader
from cluster.config.gptq import Gptq
from cluster.config.packed import Packed
from cluster.config.quantization import QUANTIZATIONS, stored_quantization
from cluster.config.tensor_parallel import Span
from cluster.experts import shard
from cluster.kernels import gpu
from cluster.kernels.experts import experts_reference
from cluster.kernels.large_pages import CPU
from cluster.kernels.parts import PartWeight
from cluster.kernels.quantized_experts import QuantizedStacks
from cluster.kernels.stack import Stack
from cluster.kernels.stored import quantized_weight, weight_of
from cluster.kernels.weights import WeightLoader

quantized = gpu_kernels("quantized")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
ONE_LAYER = {**MOE, "num_hidden_layers": 1}
FORMS = ["int8", "8 bits in groups", "int4-32", "int4-64-zeros", "int4-128-zeros", "nf4"]
IN_BLOCKS = ("8 bits in groups", "nf4")  # their inputs come in multiples of 64


def rounded(seed, name, *shape):
    random = torch.Generator().manual_seed(seed)
    matrix = torch.randn(*shape, generator=random).div(shape[1] ** 0.5)
    if name not in QUANTIZATIONS:
        return settled(Packed(8, 64), {"a": matrix}, {"a": packed_layer(matrix.half(), 8, 64, True)[0]})
    return filled(quantized_weight(*shape, quantization=QUANTIZATIONS[name], dtype=torch.float32), matrix)


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=2, deadline=None)
@given(
    seed=st.integers(0, 2**31), dtype=st.sampled_from(DTYPES), num_rows=st.integers(1, 5) | st.just(70),
    num_outputs=st.sampled_from([8, 70]), num_inputs=st.sampled_from([40, 128, 192, 320]), has_bias=st.booleans(),
)  # fmt: skip
def test_a_product_is_that_of_the_numbers(name, seed, dtype, num_rows, num_outputs, num_inputs, has_bias):
    num_inputs = 64 if name in IN_BLOCKS and num_inputs % 64 else num_inputs
    weight = rounded(seed, name, num_outputs, num_inputs)
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, num_inputs, generator=random).to(dtype)
    bias = torch.randn(num_outputs, generator=random).to(dtype) if has_bias else None
    expected = F.linear(x.double(), weight.dequantized().double(), None if bias is None else bias.double())
    given = (x.to(DEVICE), weight.matrix.to(DEVICE))
    got = quantized.linear(*given, weight.layout, None if bias is None else bias.to(DEVICE))
    assert got.dtype == dtype
    torch.testing.assert_close(got.cpu().double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def stack_of(weights, orders=None):
    rows = torch.stack([weight.matrix for weight in weights])
    return Stack(rows.to(DEVICE), weights[0].layout, None if orders is None else orders.to(DEVICE))


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=2, deadline=None)
@given(
    seed=st.integers(0, 2**31), dtype=st.sampled_from(DTYPES), num_tokens=st.integers(1, 9) | st.just(20),
    num_local=st.integers(1, 3), top_k=st.integers(1, 3), hidden=st.sampled_from([64, 192]),
    width=st.sampled_from([40, 64]), is_ordered=st.booleans(), is_sorted=st.booleans(),
)  # fmt: skip
def test_experts_are_the_weighted_sum_of_single_ones(
    name, seed, dtype, num_tokens, num_local, top_k, hidden, width, is_ordered, is_sorted
):
    """Some slots have no expert here, some experts no row, some more rows than a tile takes."""
    width = 64 if name in IN_BLOCKS else width
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, hidden, generator=random).to(dtype)
    ids = torch.randint(-1, num_local, (num_tokens, top_k), generator=random)
    weights = torch.rand(num_tokens, top_k, generator=random)
    gate_up = [rounded(seed + i, name, 2 * width, hidden) for i in range(num_local)]
    down = [rounded(seed - i - 1, name, hidden, width) for i in range(num_local)]
    means = [torch.stack([weight.dequantized().double() for weight in side]) for side in (gate_up, down)]
    orders = [None, None]
    if is_ordered:  # the input of a weight is the one that its order names
        for i, num_parts in enumerate((2, 1)):
            matrices = means[i].view(num_local * num_parts, -1, means[i].shape[-1])
            order = torch.stack([torch.randperm(matrices.shape[-1], generator=random) for _ in matrices])
            means[i] = torch.stack([m[:, o.argsort()] for m, o in zip(matrices, order, strict=True)]).view_as(means[i])
            orders[i] = order.view(num_local, num_parts, -1).int()
    stacks = stack_of(gate_up, orders[0]), stack_of(down, orders[1])
    expected = experts_reference(x.double(), ids, weights, *means)
    given = [tensor.to(DEVICE) for tensor in (x, ids, weights)]
    got = quantized.experts(*given, *stacks, max_pairs=0 if is_sorted else 1024)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.cpu(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU takes its own path")
@pytest.mark.parametrize("form", ["desc_act", "nf4"])
def test_a_model_on_a_gpu_has_the_logits_of_the_cpu(tmp_path, monkeypatch, form):
    """In the interpreter, on the CPU's memory: attention alone is the CPU's."""
    if form == "desc_act":
        folder, options = write_pair(tmp_path, ONE_LAYER, sym=False, desc_act=True)[0], {}
    else:
        folder, options = tmp_path / "plain", {"quantization": "int8+lm_head", "expert_quantization": form}
        write_checkpoint(folder, {**ONE_LAYER, "moe_intermediate_size": 64}, seed=1)
    with offline(folder, **options) as llm:
        expected = llm.logits([5, 9, 17])
    made = []

    def stacks(hidden, width, **given):
        made.append(QuantizedStacks.empty((2 * width, hidden), (hidden, width), **given))
        return made[-1]

    monkeypatch.setattr(gpu, "runs_on", lambda x: True)
    monkeypatch.setattr(shard, "no_experts", stacks)
    with offline(folder, num_expert_shards=2, **options) as llm:
        torch.testing.assert_close(llm.logits([5, 9, 17]), expected, atol=1e-3, rtol=1e-3)
        held = sum(shard.num_bytes for shard in llm.experts.transport.shards.values())
        config = llm.engine.runner.model.config
    assert len(made) == 2
    assert held == 6 * config.expert_bytes("float32", options.get("expert_quantization", "none"))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU takes its own path")
def test_a_shard_on_a_gpu_changes_its_slice_and_reads_what_is_new(tmp_path):
    gptq, _ = write_pair(tmp_path, MOE, sym=False, desc_act=True)
    reader, progress = CheckpointReader(gptq), []
    x, ids = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)), torch.tensor([[1, 5]] * 3)
    found = []
    for stacked in (False, True):
        quantization = reader.config.stored_experts
        one = shard.ExpertShard(0, reader.config, dtype=torch.float32, device=CPU, quantization=quantization)
        if stacked:
            sizes = ((64, 64), (64, 32))
            one._no_experts = QuantizedStacks.empty(*sizes, quantization=quantization, dtype=torch.float32, device=CPU)
        one.load(reader, {0: [3, 1]})
        one.load(reader, {0: [1, 2, 5]}, progress.append)
        found.append((one.forward(0, x, ids, torch.full((3, 2), 0.5)), one.num_bytes, sum(progress)))
        progress.clear()
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-4, rtol=1e-4)
    assert found[0][1:] == found[1][1:]


def test_rows_are_made_in_the_memory_of_the_cpu_wherever_they_are_kept():
    """torch's meta device has no memory: whoever read or wrote there would fail."""
    matrix = torch.randn(8, 128, generator=torch.Generator().manual_seed(1))
    plain = {"a.weight": matrix, "b.weight": matrix}
    order = np.random.default_rng(1).permutation(128)
    gptq = rounded_by_gptq(matrix, 32, sym=True, is_v1=True, order=order)[0]
    ordered = {f"{name}.{end}": tensor for name in "ab" for end, tensor in gptq.items()}
    options, parts = {"dtype": torch.float32, "device": torch.device("meta")}, {"a": 8, "b": 8}
    forms = [(QUANTIZATIONS[name], plain) for name in ("int8", "int4-32-zeros", "nf4")]
    forms.append((stored_quantization(Gptq(32, 1, is_ordered=True)), ordered))
    weights = [(weight_of(16, 128, quantization=form, **options), form, tensors, 128) for form, tensors in forms]
    second_half = dict.fromkeys(parts, Span(1, 64, 128))
    part = PartWeight(16, 64, parts=parts, spans=second_half, quantization=QUANTIZATIONS["int4-32"], **options)
    weights.append((part, QUANTIZATIONS["int4-32"], plain, 64))
    for weight, form, tensors, num_inputs in weights:
        loader = WeightLoader(lambda targets, tensors=tensors: [targets[name].copy_(tensors[name]) for name in targets])
        loader.load([(weight, parts)])
        assert weight.nbytes == 2 * form.matrix_bytes(8, num_inputs)
