"""The step of a GPU without one: on fake CUDA tensors, where shapes, dtypes and devices are as they would be there.

Triton's kernels take no fake tensors: this is the step of a GPU without Triton.
"""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cluster.checkpoint.made.published import A2_7B_CONFIG
from cluster.config import read_model_config
from cluster.experts.dispatch import ExpertDispatcher
from cluster.experts.placement import plan_evenly
from cluster.experts.routing import FixedPlan
from cluster.experts.shard import ExpertShard, LayerSlice
from cluster.experts.step import StepExperts
from cluster.experts.transport import LocalTransport
from cluster.kernels import gpu
from cluster.kernels.experts import StackedExperts
from cluster.kernels.paged import PagedBatch
from cluster.kernels.varlen_attention import VarlenAttention
from cluster.kernels.weights import weight_maker
from cluster.metrics import DispatchMetrics, new_registry
from cluster.model.decoder import MicroBatch
from cluster.model.kv_cache import KVCache
from cluster.model.layers.linear import Linear
from cluster.model.layers.rope import RotaryEmbedding
from cluster.model.registry import MODELS

CUDA = torch.device("cuda", 0)


def model_of(config, dtype):
    """As `load_model` makes it, with fake weights."""
    torch.set_default_dtype(dtype)  # the parameters of a fake model cannot be changed to another
    try:
        model = MODELS[config.model_type](config)
    finally:
        torch.set_default_dtype(torch.float32)
    for module in model.modules():
        if isinstance(module, Linear):
            module.allocate(weight_maker(dtype, CUDA), dtype=dtype, device=CUDA)
    model.rotary = RotaryEmbedding(config.rope, config.head_dim)
    return model.eval().requires_grad_(False)


def shard_of(config, dtype):
    shard = ExpertShard(0, config, dtype=dtype, device=CUDA)
    num_experts, width, hidden = config.num_experts, config.moe.moe_intermediate_size, config.hidden_size
    for layer_id in config.sparse_layers:
        gate_up = torch.empty(num_experts, 2 * width, hidden, dtype=dtype)
        down = torch.empty(num_experts, hidden, width, dtype=dtype)
        every, weights = torch.arange(num_experts), StackedExperts(gate_up, down)
        places = np.append(np.arange(num_experts), -1)
        shard.layers[layer_id] = LayerSlice(tuple(range(num_experts)), every, places, weights)
    return shard


@pytest.mark.parametrize("query_lens", [[1] * 32, [64, 1, 7]])
def test_a_step_of_the_published_shapes_stays_on_the_device_in_its_dtype(monkeypatch, query_lens):
    dtype = torch.bfloat16  # torch's fake grouped_mm takes no other, a GPU's does
    monkeypatch.setattr(gpu, "available", lambda: False)
    config = read_model_config({**A2_7B_CONFIG, "num_hidden_layers": 2})
    with FakeTensorMode(allow_non_fake_inputs=False), torch.device(CUDA):
        model, cache = model_of(config, dtype), KVCache(config, 40, 16, dtype=dtype, device=CUDA)
        transport = LocalTransport({0: shard_of(config, dtype)})
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
            token_ids=numbers, positions=numbers, lengths=numbers, attention=[VarlenAttention().plan(batch)],
            experts=StepExperts(dispatcher, len(query_lens)).part(0, query_lens, CUDA),
        )  # fmt: skip
        hidden_states = model([part], cache)
        logits = model.logits(hidden_states.narrow(0, 0, len(query_lens)))
    for tensor, shape in ((hidden_states, (num_tokens, 2048)), (logits, (len(query_lens), 151936))):
        assert (tensor.shape, tensor.dtype, tensor.device) == (shape, dtype, CUDA)
