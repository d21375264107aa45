"""Writes gptqmodel.safetensors: small layers as GPTQModel packs them, and the matrices that they mean.

`python tests/data/packed/make.py SOURCE`, SOURCE the unpacked gptqmodel-7.7.0.tar.gz of PyPI. That version wants
torch 2.14, so it does not install beside 2.13: two of its methods and a module of functions are run out of its source.
"""

import ast
import contextlib
import math
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

NUM_OUTPUTS, NUM_INPUTS, GROUP = 16, 96, 32


class Layer:
    """All that the methods want of `self`."""

    bits, maxq, planar, group_size, in_features = 4, 15, False, GROUP, NUM_INPUTS
    pack_factor, pack_dtype_bits, pack_np_math_dtype, pack_np_dtype = 8, 32, np.uint32, np.int32

    def register_buffer(self, name, tensor):
        setattr(self, name, tensor)


def method(file, name, **names):
    """A function of their file, with the names that it finds in its module."""
    nodes = ast.walk(ast.parse(file.read_text()))
    found = next(node for node in nodes if isinstance(node, ast.FunctionDef) and node.name == name)
    found.returns = None
    for argument in found.args.args:
        argument.annotation = None
    scope = {"torch": torch, "t": torch, "nn": torch.nn, "np": np, "math": math, **names}
    exec(compile(ast.Module([found], []), str(file), "exec"), scope)
    return scope[name]


def main(source):
    layers = source / "gptqmodel/nn_modules/qlinear"
    threads = SimpleNamespace(threadpool_limits=lambda _: contextlib.nullcontext())
    pack_gptq = method(
        layers / "__init__.py", "pack_original", THREADPOOLCTL=threads, transformers=transformers,
        _ConvNd=torch.nn.modules.conv._ConvNd,
    )  # fmt: skip
    packing = runpy.run_path(str(source / "gptqmodel/quantization/awq/utils/packing_utils.py"))
    pack_awq = method(layers / "torch_awq.py", "pack", pack_awq=packing["pack_awq"])
    draw = torch.Generator().manual_seed(1)
    tensors = {}
    for name, pack in (("gptq", pack_gptq), ("awq", pack_awq)):
        numbers = torch.randint(0, 16, (NUM_OUTPUTS, NUM_INPUTS), generator=draw)
        zeros = torch.randint(1, 16, (NUM_OUTPUTS, NUM_INPUTS // GROUP), generator=draw)
        scales = (torch.rand(zeros.shape, generator=draw) * 0.01 + 0.001).half().float()
        groups = torch.arange(NUM_INPUTS) // GROUP
        matrix = (numbers - zeros[:, groups]) * scales[:, groups]
        linear, layer = torch.nn.Linear(NUM_INPUTS, NUM_OUTPUTS, bias=False), Layer()
        linear.weight.data = matrix
        pack(layer, linear, scales, zeros, groups.to(torch.int32))
        tensors |= {f"{name}.{end}": getattr(layer, end) for end in ("qweight", "qzeros", "scales")}
        tensors |= {f"{name}.means": matrix} | ({"gptq.g_idx": layer.g_idx} if name == "gptq" else {})
    save_file(tensors, Path(__file__).with_name("gptqmodel.safetensors"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
