"""Weights in 8 and 4 bits: rounding, the bytes of a row, and weights that are filled from a checkpoint."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from weight_tools import filled

from cluster.config.quantization import RowLayout
from cluster.kernels import quantized
from cluster.kernels.quantized import QuantizedWeight, new_rows
from cluster.kernels.rounding import Numbers, dequantize, pack, quantize, unpack

LAYOUTS = [(8, 0, False)] + [(4, size, has_zeros) for size in (32, 64, 128) for has_zeros in (False, True)]
each_layout = pytest.mark.parametrize("form", LAYOUTS, ids=str)


def layout_of(form, num_inputs):
    return RowLayout(form[0], num_inputs, form[1], form[2])


def test_a_row_of_8_bits_by_hand():
    """127 is the largest magnitude, so the factor is 1, and 0.5, 1.5 and 2.5 are ties, which go to even."""
    matrix = torch.tensor([[127.0, -3.2, 0.5, 1.5, 2.5, -127.0], [0.0] * 6])
    numbers = quantize(matrix, RowLayout(8, 6))
    assert numbers.numbers.tolist() == [[127, -3, 0, 2, 2, -127], [0] * 6]
    assert numbers.factors.tolist() == [1.0, 0.0]


def test_a_symmetric_group_of_4_bits_by_hand():
    """The largest magnitude is 16 and gets -8, so the scale is -2; 7 is the most on the other side. The second group's
    largest is -4 (4 is as large), so its scale is 0.5. The factor is a power of two above every scale's magnitude:
    frexp of 2 is 0.5 * 2^2, so it is 4, and the scales are -0.5 and 0.125 of it."""
    matrix = torch.zeros(1, 64)
    matrix[0, :5] = torch.tensor([16.0, -15.0, 3.0, 5.0, -1.0])
    matrix[0, 32:35] = torch.tensor([-4.0, 4.0, 1.1])
    numbers = quantize(matrix, RowLayout(4, 64, 32))
    assert numbers.factors.tolist() == [4.0]
    assert numbers.scales.tolist() == [[-0.5, 0.125]]
    assert numbers.numbers[0, :5].tolist() == [-8, 7, -2, -2, 0]  # 15 / 2 and the next are ties
    assert numbers.numbers[0, 32:35].tolist() == [-8, 7, 2]


def test_a_group_with_a_zero_by_hand():
    """From -1 to 2 in 15 steps of 0.2: -1 is 0, which is stored as -8; 0 is 5 steps above, so the zero is 5 - 8."""
    matrix = torch.zeros(1, 32)
    matrix[0, :4] = torch.tensor([-1.0, 2.0, 0.39, 0.0])
    numbers = quantize(matrix, RowLayout(4, 32, 32, has_zeros=True))
    assert numbers.zeros.tolist() == [[-3]]
    assert numbers.numbers[0, :4].tolist() == [-8, 7, -1, -3]
    torch.testing.assert_close(dequantize(numbers, RowLayout(4, 32, 32, True)), matrix, atol=0.02, rtol=1e-3)


@each_layout
@settings(max_examples=25, deadline=None)
@given(k=st.integers(1, 300), exponent=st.integers(-30, 30), shift=st.floats(-3, 3), seed=st.integers(0, 100))
def test_a_number_moves_by_half_a_step_at_most(form, k, exponent, shift, seed):
    """A symmetric group's extremes are 8 steps and 7: a number next to the missing eighth moves by a whole one."""
    matrix = (torch.randn(5, k, generator=torch.Generator().manual_seed(seed)) + shift) * 2.0**exponent
    layout = layout_of(form, k)
    found = dequantize(quantize(matrix, layout), layout)
    size = layout.group_size or k
    for start in range(0, k, size):
        group = matrix[:, start : start + size]
        if form[2]:
            step = (group.amax(1).clamp_min(0) - group.amin(1).clamp_max(0)) / 15
        else:
            step = group.abs().amax(1) / (127 if form[0] == 8 else 8)
        most = {(8, False): 0.5, (4, False): 1.0, (4, True): 1.0}[form[0], form[2]]
        moved = (found[:, start : start + size] - group).abs().amax(1)
        assert (moved <= most * step * 1.01 + 2.0**exponent * 1e-4).all()


def test_a_bit_of_a_row_by_the_written_order():
    """Weight 32 j + 8 p + t of a chunk is in bits 4 p of word 8 j + t: 77 = 64 + 8 + 5 in word 21, bits 4 to 7."""
    layout = RowLayout(4, 130, 128)
    q = torch.zeros(1, 130, dtype=torch.int8)
    q[0, 77], q[0, 129] = -2, 5
    packed = pack(Numbers(q, torch.ones(1), torch.ones(1, 2).half()), layout)
    words = packed[0, layout.weights_at :].view(torch.int16)
    assert words.nonzero().flatten().tolist() == [21, 32 + 1]
    assert (int(words[21]), int(words[33])) == (14 << 4, 5)
    assert layout.weights_at == 16  # 8 of head, 2 of each scale of 4
    assert layout.row_bytes == 16 + 2 * 64


@each_layout
@pytest.mark.parametrize("k", [1, 33, 100, 128, 1408, 2048])
def test_packed_rows_come_back_as_they_were(form, k):
    layout = layout_of(form, k)
    draw = torch.Generator().manual_seed(k)
    numbers = quantize(torch.randn(7, k, generator=draw), layout)
    if form[2]:
        numbers = numbers._replace(zeros=torch.randint(-8, 9, numbers.zeros.shape, generator=draw).to(torch.int8))
    rows = pack(numbers, layout)
    assert rows.shape == (7, layout.row_bytes)
    for before, after in zip(numbers, unpack(rows, layout), strict=True):
        assert before is after is None or torch.equal(before, after)


@pytest.mark.parametrize("is_v1", [True, False])
def test_a_gptq_matrix_is_kept_as_it_is(is_v1):
    """v1 stores each zero less 1. w = (q - zero) * s, in float64 from the checkpoint's own numbers."""
    draw = torch.Generator().manual_seed(1)
    num_inputs, num_outputs, group_size = 256, 24, 128
    q = torch.randint(0, 16, (num_inputs, num_outputs), generator=draw)
    stored_zeros = torch.randint(0, 16, (2, num_outputs), generator=draw)
    scales = torch.rand(2, num_outputs, generator=draw).half() * 0.01
    zeros = stored_zeros + is_v1
    layout = RowLayout(4, num_inputs, group_size, has_zeros=True)
    weight = QuantizedWeight(new_rows(num_outputs, layout), layout, torch.float16)
    weight.fill(Numbers((q.T - 8).to(torch.int8), torch.ones(num_outputs), scales.T, (zeros.T - 8).to(torch.int8)))
    groups = torch.arange(num_inputs) // group_size
    expected = (q.double() - zeros[groups]) * scales[groups].double()
    assert torch.equal(weight.dequantized().double(), expected.T)


@each_layout
@pytest.mark.parametrize("native_kernels", [True, False])
def test_a_weight_multiplies_with_what_it_was_rounded_to(form, native_kernels, monkeypatch):
    """With the kernels and without them. nbytes is what the rows take."""
    if not native_kernels:
        monkeypatch.setattr(quantized, "native", lambda: None)
    draw = torch.Generator().manual_seed(2)
    matrix, x, bias = (torch.randn(*shape, generator=draw).bfloat16() for shape in ((50, 200), (9, 200), (50,)))
    layout = layout_of(form, 200)
    weight = filled(QuantizedWeight(new_rows(50, layout), layout, torch.bfloat16), matrix)
    rounded = weight.dequantized().double()
    assert (rounded - matrix.double()).abs().max() < (0.02 if form[0] == 8 else 0.6)
    expected = F.linear(x.double(), rounded, bias.double())
    torch.testing.assert_close(weight.product(x, bias).double(), expected, atol=1e-2, rtol=2**-8)
    assert weight.product(x[:, :200].t().contiguous().t(), bias).equal(weight.product(x, bias))
    assert weight.nbytes == 50 * layout_of(form, 200).row_bytes
    assert weight.staging_bytes == 50 * 200 * 2


@each_layout
def test_a_row_that_is_not_finite_stays_so(form):
    matrix = torch.randn(6, 70, generator=torch.Generator().manual_seed(3))
    matrix[1, 69], matrix[4, 0] = torch.nan, -torch.inf
    layout = layout_of(form, 70)
    found = dequantize(quantize(matrix, layout), layout)
    assert found.isnan().all(1).tolist() == [False, True, False, False, True, False]
    assert found[[0, 2, 3, 5]].isfinite().all()
