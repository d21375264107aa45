"""Weights with given numbers, and forms of weights that the package does not know."""

import torch
import torch.nn.functional as F

from cluster.config.quantization import stored_quantization
from cluster.kernels.stored import quantized_weight
from cluster.kernels.weights import PackedWeight, PlainWeight, TwoProducts, WeightLoader
from cluster.model.layers.linear import Linear


def filled(weight, matrix):
    """The weight with the numbers of a matrix [N, K]."""
    WeightLoader(lambda targets: targets["w.weight"].copy_(matrix)).load([(weight, {"w": len(matrix)})])
    return weight


def plain(matrix):
    return filled(PlainWeight(torch.empty_like(matrix)), matrix)


def packed(matrix):
    return filled(PackedWeight(*matrix.shape), matrix)


def settled(form, matrices, tensors):
    """A weight of a `StoredForm`, of matrices one above another, filled with their tensors as a loader does it."""
    parts = {name: len(matrix) for name, matrix in matrices.items()}
    num_inputs = next(iter(matrices.values())).shape[1]
    quantization = stored_quantization(form)
    weight = quantized_weight(sum(parts.values()), num_inputs, quantization=quantization, dtype=torch.float16)
    targets = weight.targets(parts, torch.empty(weight.staging_bytes, dtype=torch.uint8))
    assert set(targets) == {f"{name}.{end}" for name, of_layer in tensors.items() for end in of_layer}
    for name, of_layer in tensors.items():
        for end, tensor in of_layer.items():
            targets[f"{name}.{end}"].copy_(tensor)
    weight.settle()
    return weight


def held_bytes(model):
    """Of its weights, those of its layers in their forms."""
    linear = [module for module in model.modules() if isinstance(module, Linear)]
    biases = [module.bias for module in linear if module.bias is not None]
    plain = [*model.state_dict().values(), *biases]
    return sum(some.nbytes for some in (*plain, *(module.weight for module in linear)))


class HalvedWeight(TwoProducts):
    """Half of each number, doubled in the product: a form of its own, read through staging memory in float32."""

    def __init__(self, num_outputs, num_inputs):
        self.shape = (num_outputs, num_inputs)
        self.nbytes = 2 * num_outputs * num_inputs
        self.staging_bytes = 4 * num_outputs * num_inputs
        self.halves = None

    def targets(self, parts, staging):
        self.halves = staging[: self.staging_bytes].view(torch.float32).view(self.shape)
        return {
            f"{name}.weight": part for name, part in zip(parts, self.halves.split(list(parts.values())), strict=True)
        }

    def settle(self):
        self.halves = (self.halves / 2).bfloat16()

    def padded(self, num_rows):
        return -(-num_rows // 3) * 3

    def product(self, x, bias=None):
        out = F.linear(x.float(), 2 * self.halves.float())
        return (out if bias is None else out + bias).to(x.dtype)


class ScaledWeight(TwoProducts):
    """8-bit numbers and a scale a row, which the checkpoint has as two tensors: read straight into their place."""

    staging_bytes = 0

    def __init__(self, num_outputs, num_inputs):
        self.numbers = torch.empty(num_outputs, num_inputs, dtype=torch.int8)
        self.scales = torch.empty(num_outputs)
        self.is_settled = False
        self.nbytes = self.numbers.nbytes + self.scales.nbytes

    def targets(self, parts, staging):
        sizes = list(parts.values())
        numbers = dict(zip((f"{name}.qweight" for name in parts), self.numbers.split(sizes), strict=True))
        return numbers | dict(zip((f"{name}.scales" for name in parts), self.scales.split(sizes), strict=True))

    def settle(self):
        self.is_settled = True

    def padded(self, num_rows):
        return num_rows

    def product(self, x, bias=None):
        assert self.is_settled
        return F.linear(x, self.numbers.to(x.dtype) * self.scales.to(x.dtype).unsqueeze(1), bias)
