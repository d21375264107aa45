"""Products with weights in 8 and 4 bits, every variant of this machine beside float64.

The expected numbers come from a plain definition in this file, w = (q - zero) * scale * factor, not from the package's.
"""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from native_tools import assert_close, bounded, each_variant, linear

from cluster.config.quantization import RowLayout
from cluster.config.stored import GROUP_SIZES
from cluster.kernels import native_products
from cluster.kernels.native.library import DTYPES
from cluster.kernels.native_products import ExpertPointers
from cluster.kernels.rounding import Numbers, pack, quantize, unpack

ROUNDED = [(8, 0, False)] + [(4, size, has_zeros) for size in (32, 64, 128) for has_zeros in (False, True)]
FORMS = [*ROUNDED, *((8, size, False) for size in (32, 128))]  # the others come with a checkpoint alone
each_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form[0]} bits, {form[1]}, zeros {form[2]}")
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def drawn(n: int, layout: RowLayout, seed: int) -> tuple[Numbers, torch.Tensor]:
    """Numbers of every kind that the form can have, GPTQ's zeros from 1 to 16 among them, and the matrix in float64."""
    draw = torch.Generator().manual_seed(seed)
    k, factors = layout.num_inputs, torch.randn(n, generator=draw)
    low, high = (-128, 128) if layout.num_bits == 8 else (-8, 8)
    q = torch.randint(low, high, (n, k), generator=draw).to(torch.int8)
    if not layout.group_size:
        return Numbers(q, factors), q.double() * factors.double().unsqueeze(1)
    num_groups = -(-k // layout.group_size)
    scales = torch.randn(n, num_groups, generator=draw).half()
    zeros = torch.randint(-8, 9, (n, num_groups), generator=draw).to(torch.int8) if layout.has_zeros else None
    matrix = torch.empty(n, k, dtype=torch.float64)
    for i in range(k):
        group = i // layout.group_size
        zero = 0 if zeros is None else zeros[:, group].double()
        matrix[:, i] = (q[:, i].double() - zero) * scales[:, group].double() * factors.double()
    return Numbers(q, factors, scales, zeros), matrix


def sizes_of(numbers: Numbers, layout: RowLayout) -> torch.Tensor:
    scales = numbers.factors.double().abs().unsqueeze(1)
    if numbers.scales is not None:
        scales = scales * numbers.scales.double().abs().repeat_interleave(layout.group_size, 1)[:, : layout.num_inputs]
    return scales.expand(-1, layout.num_inputs) * (128 if layout.num_bits == 8 else 16)


@each_variant
@each_form
@each_dtype
@settings(max_examples=5, deadline=None)  # for each variant, form and dtype
@given(
    m=st.sampled_from([1, 2, 3, 5, 6, 7, 8, 9, 13, 17, 48, 49, 97, 100]),
    n=st.integers(1, 140),
    k=st.one_of(st.integers(1, 300), st.sampled_from([33, 100, 640])),
    with_bias=st.booleans(),
    seed=st.integers(0, 1000),
    threads=st.integers(1, 3),
)
def test_products_are_those_of_float64(native, form, dtype, m, n, k, with_bias, seed, threads) -> None:
    layout = RowLayout(form[0], k, form[1], form[2])
    numbers, matrix = drawn(n, layout, seed)
    draw = torch.Generator().manual_seed(seed)
    x, bias = (torch.randn(*shape, generator=draw).to(dtype) for shape in ((m, k + 3), (n,)))
    x = x[:, :k]  # with a stride of its own
    used = bias if with_bias else None
    found = linear(native, x, pack(numbers, layout), used, layout.form, threads)
    assert_close(found, x, matrix, sizes_of(numbers, layout), used)


@each_variant
@each_form
@pytest.mark.parametrize("k", [1408, 2048, 2560])
def test_the_models_sizes(native, form, k) -> None:
    layout = RowLayout(form[0], k, form[1], form[2])
    numbers, matrix = drawn(70, layout, k)
    x = torch.randn(9, k, generator=torch.Generator().manual_seed(k)).bfloat16()
    found = linear(native, x, pack(numbers, layout), None, layout.form, 2)
    assert_close(found, x, matrix, sizes_of(numbers, layout), None)


@each_variant
@each_form
@each_dtype
def test_each_weight_meets_its_own_input(native, form, dtype) -> None:
    """The inputs are a unit matrix, so the product is the matrix itself, rounded to dtype. Scales are powers of two."""
    layout = RowLayout(form[0], 200, form[1], form[2])
    numbers, _ = drawn(33, layout, 3)
    groups = torch.arange(33).unsqueeze(1) % 5 + torch.arange(-(-200 // (form[1] or 200))) % 3
    scales = None if numbers.scales is None else 2.0 ** -groups.half()
    numbers = numbers._replace(factors=torch.ones(33), scales=scales)
    expected = numbers.numbers.float()
    for i in range(200 if form[1] else 0):
        zero = 0 if numbers.zeros is None else numbers.zeros[:, i // form[1]]
        expected[:, i] = (expected[:, i] - zero) * numbers.scales[:, i // form[1]]
    found = linear(native, torch.eye(200, dtype=dtype), pack(numbers, layout), None, layout.form, 1)
    assert torch.equal(found.T, expected.to(dtype))


@each_variant
@each_form
@each_dtype
def test_a_row_is_the_same_number_in_every_batch(native, form, dtype) -> None:
    layout = RowLayout(form[0], 300, form[1], form[2])
    numbers, _ = drawn(75, layout, 5)
    packed = pack(numbers, layout)
    x = torch.randn(130, 300, generator=torch.Generator().manual_seed(5)).to(dtype)
    whole = linear(native, x, packed, None, layout.form, 2)
    for rows in (slice(0, 1), slice(3, 5), slice(7, 20), slice(40, 89), slice(2, 130)):
        assert torch.equal(linear(native, x[rows], packed, None, layout.form, 1), whole[rows])


@each_variant
@each_form
@each_dtype
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_stay_in_their_row(native, form, dtype, poison) -> None:
    layout = RowLayout(form[0], 100, form[1], form[2])
    numbers, _ = drawn(40, layout, 6)
    numbers.factors[7] = torch.nan
    packed = pack(numbers, layout)
    x = torch.randn(11, 100, generator=torch.Generator().manual_seed(6)).to(dtype)
    clean = linear(native, x, packed, None, layout.form, 1)
    assert clean[:, 7].isnan().all()
    x[4, 99] = poison
    found = linear(native, x, packed, None, layout.form, 1)
    others = [i for i in range(11) if i != 4]
    assert torch.equal(found[others].nan_to_num(nan=123.0), clean[others].nan_to_num(nan=123.0))
    assert not found[4].isfinite().any()


@each_variant
@each_form
def test_nothing_to_do(native, form) -> None:
    """No rows at all: nothing is written."""
    layout = RowLayout(form[0], 64, form[1], form[2])
    packed = pack(drawn(3, layout, 1)[0], layout)
    assert linear(native, torch.empty(0, 64), packed, None, layout.form, 2).shape == (0, 3)


@each_variant
@each_form
@pytest.mark.parametrize("num_rows", [1, 9, 60])
def test_a_step_of_experts_is_its_products_one_by_one(native, form, num_rows) -> None:
    """Hidden size 100, intermediate size 70, five experts and a sixth elsewhere. The middle is rounded to bfloat16."""
    hidden, inner, num_experts = 100, 70, 5
    up, down = RowLayout(form[0], hidden, form[1], form[2]), RowLayout(form[0], inner, form[1], form[2])
    gate_ups, downs = [drawn(2 * inner, up, e) for e in range(5)], [drawn(hidden, down, 10 + e) for e in range(5)]
    draw = torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, hidden, generator=draw).mul(0.002).bfloat16()
    ids = torch.stack([torch.randperm(num_experts + 1, generator=draw)[:3] for _ in range(num_rows)])
    ids[ids == num_experts] = -1
    weights = torch.rand(num_rows, 3, generator=draw)
    pointers = ExpertPointers(
        [pack(numbers, up) for numbers, _ in gate_ups], [pack(numbers, down) for numbers, _ in downs],
        form=up.form, intermediate_size=inner,
    )  # fmt: skip
    found = native_products.experts(native, x, ids, weights, pointers).double()
    expected, room = torch.zeros(2, num_rows, hidden, dtype=torch.float64)
    for t, s in (ids >= 0).nonzero().tolist():
        e = ids[t, s]
        gate, side = (gate_ups[e][1] @ x[t].double()).chunk(2)
        middle = torch.nn.functional.silu(gate) * side
        expected[t] += weights[t, s].double() * (downs[e][1] @ middle)
        room[t] += weights[t, s].double() * (downs[e][1].abs() @ (2**-7 * middle.abs() + 1e-3))
    assert ((found - expected).abs() <= room).all()
    one = native_products.experts(native, x[:1], ids[:1], weights[:1], pointers)
    assert torch.equal(one, found[:1].float())


@each_variant
@pytest.mark.parametrize("form", ROUNDED, ids=str)
@each_dtype
@settings(max_examples=7, deadline=None)
@given(
    n=st.integers(1, 40), k=st.integers(1, 300), exponent=st.integers(-20, 10), shift=st.floats(-3, 3),
    seed=st.integers(0, 100), threads=st.integers(1, 3),
)  # fmt: skip
@example(n=12, k=1, exponent=-19, shift=0.625, seed=0, threads=1)  # rows of -0 in float16
def test_rows_are_rounded_as_the_plain_definition_rounds_them(
    native, form, dtype, n, k, exponent, shift, seed, threads
) -> None:
    """Bit by bit, ties and a row that is not finite among them."""
    layout = RowLayout(form[0], k, form[1], form[2])
    matrix = (torch.randn(n, k + 3, generator=torch.Generator().manual_seed(seed)) + shift) * 2.0**exponent
    matrix[0, : k // 2] = matrix[0, : k // 2].mul(4).round() / 8
    matrix = matrix.to(dtype)[:, :k]
    matrix[n // 2, k // 3] = torch.inf if seed % 2 else torch.nan
    rows, check = bounded((n, layout.row_bytes), torch.uint8)
    native.quantize(
        DTYPES[dtype], matrix.data_ptr(), matrix.stride(0), form[0], GROUP_SIZES.index(form[1]) if form[1] else 0,
        form[2], rows.data_ptr(), layout.row_bytes, n, k, threads,
    )  # fmt: skip
    check()
    expected = pack(quantize(matrix, layout), layout)
    others = [i for i in range(n) if i != n // 2]
    assert torch.equal(rows[others], expected[others])
    assert unpack(rows, layout).factors.isnan().nonzero().tolist() == [[n // 2]]
