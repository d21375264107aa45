"""A rank's part of a matrix in fewer bits: bit for bit that part of the matrix that one process has."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from gptq_tools import rounded
from stored_tools import awq_layer, packed_layer

from cluster.config.awq import Awq
from cluster.config.gptq import Gptq
from cluster.config.packed import Packed
from cluster.config.quantization import QUANTIZATIONS, stored_quantization
from cluster.config.tensor_parallel import Span
from cluster.kernels.parts import PartWeight
from cluster.kernels.stored import quantized_weight
from cluster.kernels.weights import WeightLoader

INPUTS = 640  # 10 blocks of nf4: the scales that 256 of these share end inside of rows
ROUNDED_HERE = ("int8", "int4", "int4-32", "int4-64-zeros", "nf4")
STORED = {
    **{
        f"gptq {size} {sym} {is_v1}": (
            Gptq(max(0, size), int(is_v1), sym),
            lambda matrix, size=size, sym=sym, is_v1=is_v1: rounded(matrix, size, sym=sym, is_v1=is_v1),
        )
        for size, sym, is_v1 in ((32, False, True), (128, True, True), (128, False, False), (-1, False, True))
    },
    "awq": (Awq(128), lambda matrix: awq_layer(matrix, 128)),
    "8 bits": (Packed(8, 0), lambda matrix: packed_layer(matrix, 8, None, True)),
    "8 bits in groups": (Packed(8, 64), lambda matrix: packed_layer(matrix, 8, 64, True)),
    "4 bits with zeros": (Packed(4, 32, False), lambda matrix: packed_layer(matrix, 4, 32, False)),
}
FORMS = {name: QUANTIZATIONS[name] for name in ROUNDED_HERE} | {
    name: stored_quantization(form) for name, (form, _) in STORED.items()
}


def read(weight, tensors, parts):
    """The weight, filled as a loader does it. tensors: of the whole matrices, by name."""

    def copy(targets):
        for name, target in targets.items():
            target.copy_(tensors[name])

    WeightLoader(copy).load([(weight, parts)])
    return weight


def whole_and_tensors(name, sizes, num_inputs=INPUTS):
    """Of matrices one above another: each dequantized as one process has it, and the checkpoint's tensors."""
    draw, tensors, found = torch.Generator().manual_seed(1), {}, {}
    for layer, num_outputs in sizes.items():
        matrix = torch.randn(num_outputs, num_inputs, generator=draw).half()
        if name in STORED:
            of_layer, means = STORED[name][1](matrix)
            tensors |= {f"{layer}.{end}": tensor for end, tensor in of_layer.items()}
        else:
            tensors[f"{layer}.weight"] = matrix
        weight = quantized_weight(num_outputs, num_inputs, quantization=FORMS[name], dtype=torch.float16)
        found[layer] = read(weight, tensors, {layer: num_outputs}).dequantized()
        if name in STORED:
            assert torch.equal(found[layer], means)
    return found, tensors


def part_of(name, tensors, spans, parts, num_inputs):
    options = {"quantization": FORMS[name], "dtype": torch.float16}
    weight = PartWeight(sum(parts.values()), num_inputs, parts=parts, spans=spans, **options)
    return read(weight, tensors, parts)


@pytest.mark.parametrize("name", FORMS)
def test_some_outputs_of_several_matrices_are_those_of_the_whole(name):
    """One matrix is cut in the middle, of one the end is this rank's, and one is all its own."""
    wholes, tensors = whole_and_tensors(name, {"a": 48, "b": 16, "c": 24})
    spans, parts = {"a": Span(0, 9, 48), "b": None, "c": Span(0, 19, 24)}, {"a": 20, "b": 16, "c": 5}
    part = part_of(name, tensors, spans, parts, INPUTS)
    expected = torch.cat([wholes["a"][9:29], wholes["b"], wholes["c"][19:]])
    assert torch.equal(part.dequantized(), expected)
    x = torch.randn(3, INPUTS, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(part.product(x), F.linear(x, expected), atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "num_outputs"), [*((name, 40) for name in FORMS), *((name, 1040) for name in ("int8", "int4-32", "nf4"))]
)
def test_some_inputs_are_those_of_the_whole(name, num_outputs):
    """All ranks of three together, the last of which ends with the matrix."""
    wholes, tensors = whole_and_tensors(name, {"a": num_outputs})
    unit = FORMS[name].inputs_together
    starts = [0, -(-200 // unit) * unit, -(-400 // unit) * unit, INPUTS]
    x = torch.randn(3, INPUTS, generator=torch.Generator().manual_seed(2))
    total = torch.zeros(3, num_outputs)
    for first, stop in pairwise(starts):
        part = part_of(name, tensors, {"a": Span(1, first, INPUTS)}, {"a": num_outputs}, stop - first)
        assert torch.equal(part.dequantized(), wholes["a"][:, first:stop])
        total += part.product(x[:, first:stop].contiguous())
    torch.testing.assert_close(total, F.linear(x, wholes["a"]), atol=5e-3, rtol=1e-4)
