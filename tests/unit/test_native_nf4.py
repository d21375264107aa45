"""Products with weights in nf4, every variant of this machine beside float64 of the matrix that they mean.

That the matrix is the one that bitsandbytes means is in test_oracles.py.
"""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from native_tools import assert_close, bounded, each_variant, linear
from weight_tools import filled

from cluster.config.quantization import RowLayout
from cluster.kernels import native_products, nf4, quantized
from cluster.kernels.native_products import ExpertPointers
from cluster.kernels.nf4 import Nf4Weight, pack
from cluster.kernels.quantized import new_rows

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def drawn(num_outputs, num_inputs, seed):
    """Rows, and the matrix in float64."""
    matrix = torch.randn(num_outputs, num_inputs, generator=torch.Generator().manual_seed(seed))
    rounded = nf4.quantize(matrix)
    return pack(rounded, layout_of(num_inputs)), nf4.dequantize(rounded).double()


def layout_of(num_inputs):
    return RowLayout(4, num_inputs, 64, is_nf4=True)


@each_variant
@each_dtype
@settings(max_examples=4, deadline=None)
@given(
    m=st.sampled_from([1, 2, 3, 5, 8, 9, 17, 49, 97]), n=st.integers(1, 70), blocks=st.integers(1, 9),
    with_bias=st.booleans(), seed=st.integers(0, 1000), threads=st.integers(1, 3),
)  # fmt: skip
@example(m=1, n=70, blocks=22, with_bias=False, seed=1, threads=2)  # a row's blocks have two nested scales
@example(m=2, n=3, blocks=320, with_bias=False, seed=1, threads=1)  # or three
def test_products_are_those_of_float64(native, dtype, m, n, blocks, with_bias, seed, threads):
    rows, matrix = drawn(n, 64 * blocks, seed)
    draw = torch.Generator().manual_seed(seed)
    x, bias = (torch.randn(*shape, generator=draw).to(dtype) for shape in ((m, 64 * blocks), (n,)))
    used = bias if with_bias else None
    found = linear(native, x, rows, used, layout_of(64 * blocks).form, threads)
    sizes = matrix.abs().amax(1, keepdim=True).expand_as(matrix)
    assert_close(found, x, matrix, sizes, used)


@each_variant
def test_each_weight_meets_its_own_input(native):
    """The inputs are a unit matrix: the product is the matrix itself, to the last bits of its block's scale."""
    rows, matrix = drawn(33, 192, 3)
    found = linear(native, torch.eye(192), rows, None, layout_of(192).form, 1)
    torch.testing.assert_close(found.T.double(), matrix, rtol=1e-6, atol=1e-7)


@each_variant
@each_dtype
@settings(max_examples=5, deadline=None)
@given(n=st.integers(1, 40), blocks=st.integers(1, 30), exponent=st.integers(-9, 3), seed=st.integers(0, 1000))
def test_a_row_is_rounded_as_the_plain_definition_has_it(native, dtype, n, blocks, exponent, seed):
    """Bit by bit; a block of zeros, and ties between two levels, among them."""
    matrix = torch.randn(n, 64 * blocks + 3, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    matrix[0, :64] = 0
    levels = torch.tensor(nf4.LEVELS)
    matrix[-1, 1:16], matrix[-1, 0] = (levels[:-1] + levels[1:]) / 2, 1
    matrix = matrix.to(dtype)[:, : 64 * blocks]
    layout = layout_of(64 * blocks)
    rows, check = bounded((n, layout.row_bytes), torch.uint8)
    nf4.fill_rows(rows, matrix, layout, native)
    check()
    assert torch.equal(rows, pack(nf4.quantize(matrix), layout))


@each_variant
def test_a_matrix_that_is_not_finite_stays_so(native):
    matrix = torch.randn(5, 64)
    matrix[3, 7] = torch.inf
    rows = torch.empty(5, layout_of(64).row_bytes, dtype=torch.uint8)
    nf4.fill_rows(rows, matrix, layout_of(64), native)
    assert torch.equal(rows[:, :4], pack(nf4.quantize(matrix), layout_of(64))[:, :4])
    assert linear(native, torch.ones(2, 64), rows, None, layout_of(64).form, 1).isnan().all()
    assert nf4.unpacked(rows, layout_of(64)).isnan().all()


@each_variant
def test_a_step_of_experts_is_its_products_one_by_one(native):
    hidden, inner = 128, 64
    gate_ups, downs = [drawn(2 * inner, hidden, e) for e in range(4)], [drawn(hidden, inner, 9 + e) for e in range(4)]
    draw = torch.Generator().manual_seed(1)
    x, weights = torch.randn(9, hidden, generator=draw) * 0.1, torch.rand(9, 2, generator=draw)
    ids = torch.stack([torch.randperm(5, generator=draw)[:2] for _ in range(9)])
    ids[ids == 4] = -1
    pointers = ExpertPointers(
        [rows for rows, _ in gate_ups], [rows for rows, _ in downs], form=layout_of(hidden).form,
        intermediate_size=inner,
    )  # fmt: skip
    found = native_products.experts(native, x, ids, weights, pointers)
    expected = torch.zeros(9, hidden, dtype=torch.float64)
    for t, s in (ids >= 0).nonzero().tolist():
        gate, up = (gate_ups[ids[t, s]][1] @ x[t].double()).chunk(2)
        expected[t] += weights[t, s] * (downs[ids[t, s]][1] @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("native_kernels", [True, False])
def test_a_weight_multiplies_with_what_it_was_rounded_to(native_kernels, monkeypatch):
    if not native_kernels:
        monkeypatch.setattr(quantized, "native", lambda: None)
    draw = torch.Generator().manual_seed(2)
    matrix, x, bias = (torch.randn(*shape, generator=draw).bfloat16() for shape in ((50, 192), (9, 192), (50,)))
    weight = filled(Nf4Weight(new_rows(50, layout_of(192)), layout_of(192), torch.bfloat16), matrix)
    rounded = weight.dequantized().double()
    assert (rounded - matrix.double()).abs().max() < 0.6
    expected = x.double() @ rounded.T + bias.double()
    torch.testing.assert_close(weight.product(x, bias).double(), expected, atol=1e-2, rtol=2**-8)


def test_its_memory_is_that_of_4_bits():
    """A matrix of Qwen1.5-MoE-A2.7B's shape: half a byte a weight, a byte a block of 64, 4 bytes for 256 of these."""
    weight = Nf4Weight(new_rows(2816, layout_of(2048)), layout_of(2048), torch.bfloat16)
    assert weight.nbytes <= 1.1 * 2816 * 2048 * (1 / 2 + 1 / 64 + 4 / 64 / 256)
