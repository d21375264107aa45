"""A shard's step by the native kernels, every variant of this machine beside float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_tools import bounded, each_variant

from cluster.kernels import native_products
from cluster.kernels.experts import NativeExperts
from cluster.kernels.native.library import DTYPES, Native
from cluster.kernels.weights import NativeWeight

ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
each_dtype = pytest.mark.parametrize("dtype", list(ROUNDING))


def drawn(seed, dtype, num_rows, num_slots, num_experts, hidden, intermediate):
    """Hidden states, ids of which some are elsewhere, weights, gate above up, down."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, hidden, generator=random).to(dtype)
    ids = torch.stack(
        [torch.randperm(num_experts + num_slots, generator=random)[:num_slots] for _ in range(num_rows)]
    ).reshape(num_rows, num_slots)
    ids[ids >= num_experts] = -1
    weights = torch.rand(num_rows, num_slots, generator=random)
    gate_up = [torch.randn(2 * intermediate, hidden, generator=random).to(dtype) for _ in range(num_experts)]
    down = [torch.randn(hidden, intermediate, generator=random).to(dtype) for _ in range(num_experts)]
    return x, ids, weights, gate_up, down


def exact(x, ids, weights, gate_up, down):
    """In float64, and how far a result in x's dtype may lie from it: the middle is rounded, each sum is in float32."""
    out, room = torch.zeros(2, *x.shape, dtype=torch.float64)
    sums = 2**-22 * (8 + x.shape[1] + down[0].shape[1])
    for t, s in (ids >= 0).nonzero().tolist():
        e = ids[t, s]
        gate, up = (gate_up[e].double() @ x[t].double()).chunk(2)
        middle = torch.nn.functional.silu(gate) * up
        out[t] += weights[t, s].double() * (down[e].double() @ middle)
        gate_size, up_size = (gate_up[e].double().abs() @ x[t].double().abs()).chunk(2)
        off = 2 * ROUNDING[x.dtype] * middle.abs() + sums * (1 + gate_size) * up_size
        room[t] += weights[t, s].double() * (down[e].double().abs() @ off)
    return out, 1e-6 + 2 * room


def run(native: Native, x, ids, weights, gate_up, down, threads=2):
    """Into memory with guards."""
    pointers = native_products.ExpertPointers(gate_up, down)
    (num_rows, hidden), intermediate, dtype = x.shape, down[0].shape[1], DTYPES[x.dtype]
    num_bytes = native.experts_scratch(dtype, num_rows, ids.shape[1], len(down), hidden, intermediate)
    (out, check), (scratch, check_scratch) = (
        bounded((num_rows, hidden), torch.float32),
        bounded((num_bytes,), torch.uint8),
    )
    native.experts(
        dtype, x.data_ptr(), x.stride(0), ids.data_ptr(), weights.data_ptr(), num_rows, ids.shape[1],
        pointers.gate_up.data_ptr(), pointers.down.data_ptr(), len(down), hidden, intermediate,
        out.data_ptr(), scratch.data_ptr(), threads,
    )  # fmt: skip
    check()
    check_scratch()
    return out


@each_variant
@each_dtype
@settings(max_examples=25, deadline=None)
@given(
    num_rows=st.sampled_from([1, 2, 3, 7, 30, 110]),
    num_slots=st.integers(1, 4),
    num_experts=st.integers(1, 6),
    hidden=st.sampled_from([1, 7, 32, 33, 64, 100]),
    intermediate=st.sampled_from([1, 5, 31, 32, 48, 70, 96]),
    seed=st.integers(0, 1000),
    threads=st.integers(1, 3),
)
def test_sums_are_those_of_float64(
    native, dtype, num_rows, num_slots, num_experts, hidden, intermediate, seed, threads
) -> None:
    given_numbers = drawn(seed, dtype, num_rows, num_slots, num_experts, hidden, intermediate)
    found = run(native, *given_numbers, threads=threads)
    wanted, room = exact(*given_numbers)
    assert ((found.double() - wanted).abs() <= room).all()


@each_variant
@each_dtype
@pytest.mark.parametrize("intermediate", [40, 64])
def test_a_row_is_the_same_number_in_every_batch(native, dtype, intermediate) -> None:
    x, ids, weights, gate_up, down = drawn(3, dtype, 120, 3, 4, 96, intermediate)
    whole = run(native, x, ids, weights, gate_up, down)
    for rows in (slice(0, 1), slice(5, 9), slice(20, 75), slice(1, 120)):
        part = run(native, x[rows], ids[rows].contiguous(), weights[rows].contiguous(), gate_up, down, threads=1)
        assert torch.equal(part, whole[rows])


@each_variant
@pytest.mark.parametrize("num_experts", [1, 3])
@pytest.mark.parametrize(("hidden", "intermediate"), [(544, 96), (50, 70)])
def test_many_rows_are_multiplied_in_groups(native, num_experts, hidden, intermediate) -> None:
    """One expert's groups one after another, of several each one's all; some rows have none here."""
    given_numbers = x, ids, weights, gate_up, down = drawn(5, torch.bfloat16, 530, 1, num_experts, hidden, intermediate)
    assert 0 < (ids < 0).sum() < 530
    found = run(native, *given_numbers, threads=3)
    wanted, room = exact(*given_numbers)
    assert ((found.double() - wanted).abs() <= room).all()
    assert not found[ids[:, 0] < 0].any()
    part = run(native, x[7:40], ids[7:40].contiguous(), weights[7:40].contiguous(), gate_up, down, threads=1)
    assert torch.equal(part, found[7:40])


@each_variant
@pytest.mark.parametrize("num_rows", [1, 2])
def test_an_expert_may_be_named_twice(native, num_rows) -> None:
    """No router does."""
    x, _, weights, gate_up, down = drawn(4, torch.bfloat16, num_rows, 3, 2, 64, 32)
    given_numbers = x, torch.tensor([[0, 1, 0]] * num_rows), weights, gate_up, down
    wanted, room = exact(*given_numbers)
    assert ((run(native, *given_numbers).double() - wanted).abs() <= room).all()


@each_variant
def test_no_row_here_gives_zeros(native) -> None:
    x, ids, weights, gate_up, down = drawn(1, torch.bfloat16, 3, 2, 2, 40, 24)
    assert torch.equal(run(native, x, torch.full_like(ids, -1), weights, gate_up, down), torch.zeros(3, 40))


@each_variant
@each_dtype
@pytest.mark.parametrize(("hidden", "intermediate"), [(50, 30), (64, 32)])
def test_nan_and_infinity_stay_in_their_row(native, dtype, hidden, intermediate) -> None:
    x, ids, weights, gate_up, down = drawn(2, dtype, 9, 2, 3, hidden, intermediate)
    ids[:] = torch.tensor([0, 1])
    clean = run(native, x, ids, weights, gate_up, down)
    x[4, 7], x[6, 0] = torch.nan, torch.inf
    found = run(native, x, ids, weights, gate_up, down)
    others = [0, 1, 2, 3, 5, 7, 8]
    assert torch.equal(found[others], clean[others])
    assert found[4].isnan().all()
    assert not found[6].isfinite().any()


@each_variant
def test_slots_of_experts_elsewhere_do_not_make_a_step_large(native, monkeypatch) -> None:
    x, ids, weights, gate_up, down = drawn(6, torch.bfloat16, 300, 2, 1, 32, 32)
    made = NativeExperts(
        lambda: NativeWeight.empty(64, 32, dtype=torch.bfloat16, native=native),
        lambda: NativeWeight.empty(32, 32, dtype=torch.bfloat16, native=native),
        native,
    ).rearranged([None])
    made.gate_up[0].matrix.copy_(gate_up[0])
    made.down[0].matrix.copy_(down[0])
    ids[20:] = -1
    monkeypatch.delattr("cluster.kernels.experts.experts_by_loop")
    assert torch.equal(made.forward(x, ids, weights), run(native, x, ids, weights, gate_up, down))


@each_variant
def test_rearranged_experts_share_their_weights(native) -> None:
    x, ids, weights, gate_up, down = drawn(6, torch.bfloat16, 5, 2, 3, 32, 16)
    made = NativeExperts(
        lambda: NativeWeight.empty(32, 32, dtype=torch.bfloat16, native=native),
        lambda: NativeWeight.empty(32, 16, dtype=torch.bfloat16, native=native),
        native,
    ).rearranged([None, None, None])
    for place in range(3):
        made.gate_up[place].matrix.copy_(gate_up[place])
        made.down[place].matrix.copy_(down[place])
    before = made.forward(x, ids, weights)
    other = made.rearranged([2, 0])
    moved = torch.tensor([1, -1, 0, -1])[ids]  # expert 1 is gone; -1 picks the last
    wanted = run(native, x, moved, weights, [gate_up[2], gate_up[0]], [down[2], down[0]])
    assert torch.equal(other.forward(x, moved, weights), wanted)
    assert torch.equal(made.forward(x, ids, weights), before)


@each_variant
def test_a_dense_layer_is_one_expert(native) -> None:
    x, _, _, (gate_up,), (down,) = drawn(8, torch.bfloat16, 70, 1, 1, 64, 48)
    wanted, room = exact(x, torch.zeros(70, 1, dtype=torch.int64), torch.ones(70, 1), [gate_up], [down])
    for num_rows in (1, 9, 70):
        found = NativeWeight(gate_up, native).swiglu(x[:num_rows], NativeWeight(down, native))
        assert found.dtype == torch.bfloat16
        assert ((found.double() - wanted[:num_rows]).abs() <= room[:num_rows] + 2**-8 * wanted[:num_rows].abs()).all()
