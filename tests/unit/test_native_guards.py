"""Rows that do not fit a weight, and tensors that a kernel cannot read as they are."""

import numpy as np
import pytest
import torch
from native_tools import each_variant

from cluster.kernels import native_products
from cluster.kernels.experts import no_experts
from cluster.kernels.native.library import native
from cluster.kernels.norm import add_and_norm, add_and_norm_reference
from cluster.kernels.rotary import rotate_to_cache, rotate_to_cache_reference
from cluster.kernels.router import choose
from cluster.kernels.sampling.native import choose_natively, pack
from cluster.kernels.sampling.rule import Rule

pytestmark = pytest.mark.skipif(native() is None, reason="the native kernels are not built")


def bfloat16(*shape):
    return torch.arange(torch.Size(shape).numel()).remainder(7).sub(3).view(shape).bfloat16()


@pytest.mark.parametrize(
    "x", [bfloat16(3, 16), bfloat16(3, 64).half(), bfloat16(3, 64).float()], ids=["width", "float16", "float32"]
)
def test_rows_that_do_not_fit_are_refused(x):
    """They may come from another process, which computes another model."""
    made = no_experts(64, 32, dtype=torch.bfloat16, device=torch.device("cpu")).rearranged([None])
    with pytest.raises(ValueError, match="do not fit"):
        made.forward(x, torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))
    with pytest.raises(ValueError, match="do not fit"):
        native_products.linear(native(), x, bfloat16(8, 64), None)


@pytest.mark.parametrize(
    "bias", [bfloat16(16)[::2], bfloat16(8).float(), bfloat16(7)], ids=["strides", "float", "short"]
)
def test_a_bias_that_does_not_fit_is_refused(bias):
    with pytest.raises(ValueError, match="do not fit"):
        native_products.linear(native(), bfloat16(3, 64), bfloat16(8, 64), bias)


def test_no_experts_give_zeros():
    made = no_experts(64, 32, dtype=torch.bfloat16, device=torch.device("cpu"))
    out = made.forward(bfloat16(3, 64), torch.full((3, 2), -1), torch.ones(3, 2))
    assert torch.equal(out, torch.zeros(3, 64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torchs_default_dtype_changes_nothing(dtype):
    logits = bfloat16(4, 60)
    ids, weights = native_products.choose(native(), logits, 4, normalize=False)
    torch.set_default_dtype(dtype)
    try:
        found_ids, found = native_products.choose(native(), logits, 4, normalize=False)
        chosen = choose_natively(native(), logits, [Rule(num_top=2)] * 4, 1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found_ids, ids)
    assert torch.equal(found, weights)
    torch.testing.assert_close(torch.tensor(chosen.logprobs), logits.float().log_softmax(dim=1).amax(dim=1))


@pytest.mark.parametrize(
    ("delta", "weight"),
    [
        (None, bfloat16(64).float()), (None, bfloat16(128)[::2]),
        (bfloat16(3, 64).float(), bfloat16(64)), (bfloat16(1, 64), bfloat16(64)),
    ],
    ids=["float weight", "strides", "float delta", "one row"],
)  # fmt: skip
def test_a_norm_that_no_kernel_takes_is_the_references(delta, weight):
    x = bfloat16(3, 64)
    for found, wanted in zip(
        add_and_norm(x, delta, weight, 1e-6), add_and_norm_reference(x, delta, weight, 1e-6), strict=True
    ):
        assert torch.equal(found, wanted)


def test_slots_with_strides_are_those_of_the_reference():
    slots = torch.tensor([3, 99, 0, 99, 5, 99])[::2]
    rotary = bfloat16(3, 1, 8), bfloat16(3, 1, 8) / 2
    caches = [[torch.zeros(2, 4, 1, 8).bfloat16() for _ in range(2)] for _ in range(2)]
    found = rotate_to_cache(bfloat16(3, 32), rotary, tuple(caches[0]), slots)
    wanted = rotate_to_cache_reference(bfloat16(3, 32), rotary, tuple(caches[1]), slots)
    assert torch.equal(found, wanted)
    assert all(torch.equal(a, b) for a, b in zip(*caches, strict=True))


@each_variant
def test_a_row_with_one_nan_chooses_no_expert_twice(native):
    ids, weights = native_products.choose(native, torch.tensor([[0.0, 5.0, torch.nan]]), 2, normalize=False)
    assert len(set(ids[0].tolist())) == 2
    assert weights.isnan().all()
    assert choose(torch.tensor([[0.0, 5.0, torch.nan]]), 2, normalize=False)[1].isnan().all()


@each_variant
@pytest.mark.parametrize("gate", [-1e30, -torch.inf, -89.0, 89.0, 1e30])
def test_silu_of_extreme_gates_is_torchs(native, gate):
    x, gate_up, down = torch.tensor([[gate]]), torch.ones(2, 1), torch.ones(1, 1)
    gate_up[1] = 0 if gate == -torch.inf else 1 / gate
    found = native_products.swiglu(native, x, native_products.ExpertPointers([gate_up], [down]))
    wanted = torch.nn.functional.silu(x) * (x * gate_up[1])
    torch.testing.assert_close(found, wanted, equal_nan=True, atol=1e-36, rtol=1e-6)


@each_variant
def test_a_temperature_that_float32_does_not_hold_is_greedy(native):
    logits = torch.zeros(1, 700)
    logits[0, 444] = 1
    for rule in (Rule(temperature=1e-50), Rule(temperature=1e-50, top_p=0.5), Rule(temperature=1e-50, top_k=3)):
        assert list(choose_natively(native, logits, [rule], 1).token_ids) == [444]


def test_changed_tokens_may_come_in_any_whole_numbers():
    packed = pack([Rule(banned=np.array([700, 9]))])
    assert packed.ids.dtype == torch.int32
    assert packed.ids.tolist() == [700, 9]
