"""The step of a GPU without one: on fake CUDA tensors, where shapes, dtypes and devices are as they would be there.

Triton's kernels take no fake tensors: with Triton a launch only looks where its tensors are. No value of a tensor is
known, so that the step would fail where it waits for one.
"""

from functools import partial

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_tools import gpu_kernels

from cluster.checkpoint.made.published import A2_7B_CONFIG
from cluster.config import read_model_config
from cluster.config.gptq import Gptq
from cluster.config.quantization import QUANTIZATIONS, stored_quantization
from cluster.experts.dispatch import ExpertDispatcher
from cluster.experts.placement import plan_evenly
from cluster.experts.routing import FixedPlan
from cluster.experts.shard import ExpertShard, LayerSlice
from cluster.experts.step import StepExperts
from cluster.experts.transport import LocalTransport
from cluster.kernels import gpu
from cluster.kernels.paged import PagedBatch
from cluster.kernels.stored import weight_of
from cluster.kernels.varlen_attention import VarlenAttention
from cluster.kernels.weights import weight_maker
from cluster.metrics import DispatchMetrics, new_registry
from cluster.model.decoder import MicroBatch
from cluster.model.kv_cache import KVCache
from cluster.model.layers.linear import Linear
from cluster.model.layers.rope import RotaryEmbedding
from cluster.model.registry import MODELS

CUDA = torch.device("cuda", 0)


def model_of(config, dtype, quantization=None):
    """As `load_model` makes it, with fake weights."""
    torch.set_default_dtype(dtype)  # the parameters of a fake model cannot be changed to another
    try:
        model = MODELS[config.model_type](config)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            make = weight_maker(dtype, CUDA)
            if quantization is not None and quantization.takes(name):
                make = partial(weight_of, quantization=quantization, dtype=dtype, device=CUDA)
            module.allocate(make, dtype=dtype, device=CUDA)
            staging = torch.empty(module.weight.staging_bytes, dtype=torch.uint8, device="cpu")
            module.weight.targets(module.parts(""), staging)
    model.rotary = RotaryEmbedding(config.rope, config.head_dim)
    return model.eval().requires_grad_(False)


def shard_of(config, dtype, quantization=None):
    shard = ExpertShard(0, config, dtype=dtype, device=CUDA, quantization=quantization)
    num_experts = config.num_experts
    for layer_id in config.sparse_layers:
        every, weights = torch.arange(num_experts), shard._no_experts.rearranged([None] * num_experts)
        places = np.append(np.arange(num_experts), -1)
        shard.layers[layer_id] = LayerSlice(tuple(range(num_experts)), every, places, weights)
    return shard


def check_step(query_lens, attention, quantization=None):
    dtype = torch.bfloat16  # torch's fake grouped_mm takes no other, a GPU's does
    config = read_model_config({**A2_7B_CONFIG, "num_hidden_layers": 2})
    with FakeTensorMode(allow_non_fake_inputs=False), torch.device(CUDA):
        model, cache = model_of(config, dtype, quantization), KVCache(config, 40, 16, dtype=dtype, device=CUDA)
        transport = LocalTransport({0: shard_of(config, dtype, quantization)})
        plans = FixedPlan(plan_evenly(config.sparse_layers, config.num_experts, 1))
        dispatcher = ExpertDispatcher(transport, plans, DispatchMetrics(new_registry(), "test"))
        num_tokens = sum(query_lens)
        numbers = torch.zeros(num_tokens, dtype=torch.int64)
        tables, lens = numbers.new_zeros(len(query_lens), 4), numbers.new_ones(len(query_lens))
        batch = PagedBatch(
            query_lens=query_lens, context_lens=query_lens, block_tables=tables, slot_mapping=numbers,
            context_lens_tensor=lens, padding_block=40,
        )  # fmt: skip
        part = MicroBatch(
            token_ids=numbers, positions=numbers, lengths=numbers, attention=[attention.plan(batch)],
            experts=StepExperts(dispatcher, len(query_lens)).part(0, query_lens, CUDA),
        )  # fmt: skip
        hidden_states = model([part], cache)
        logits = model.logits(hidden_states.narrow(0, 0, len(query_lens)))
    for tensor, shape in ((hidden_states, (num_tokens, 2048)), (logits, (len(query_lens), 151936))):
        assert (tensor.shape, tensor.dtype, tensor.device) == (shape, dtype, CUDA)


STEPS = pytest.mark.parametrize("query_lens", [[1] * 32, [640, 1, 7]])


@STEPS
def test_a_step_of_the_published_shapes_stays_on_the_device_in_its_dtype(monkeypatch, query_lens):
    monkeypatch.setattr(gpu, "available", lambda: False)
    check_step(query_lens, VarlenAttention())


@STEPS
@pytest.mark.parametrize(
    "quantization",
    [None, QUANTIZATIONS["nf4"], stored_quantization(Gptq(128, 1, is_ordered=True))],
    ids=["plain", "nf4", "desc_act"],
)
def test_with_triton_every_launch_finds_its_tensors_on_the_device(launches, quantization, query_lens):
    """One launch and more of each kernel of this form, with few rows for each expert and with many."""
    check_step(query_lens, gpu_kernels("attention").PagedAttention(1), quantization)
    made = set(launches)
    assert {"_rms_norm", "_rotate_and_write", "_route", "_localize", "_attend", "_combine"} <= made
    assert ("_linear" in made) == (quantization is not None)
    assert ("_gate_up" in made) == ("_down" in made) == (quantization is not None or len(query_lens) == 32)


@pytest.fixture
def launches(monkeypatch):
    """The kernels' names; nothing is launched."""
    jit, made = pytest.importorskip("triton.runtime.jit"), []

    def of(kernel, grid):
        def look(*given, **options):
            assert {tensor.device for tensor in given if isinstance(tensor, torch.Tensor)} == {CUDA}
            assert all(size > 0 for size in grid)
            made.append(kernel.fn.__name__)

        return look

    monkeypatch.setattr(jit.KernelInterface, "__getitem__", of)
    # Kept for all steps, and those of other tests have values.
    monkeypatch.setattr(gpu_kernels("quantized"), "_nf4_tables", lambda device: torch.empty(16 + 256, device=device))
    return made
