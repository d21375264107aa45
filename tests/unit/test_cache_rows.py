"""Keys and values in 8 bits: what a row's bytes mean, how far they are from the numbers, and attention over them by
torch, beside its definition over those numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_native_attention import Shape, exact, paged

from cluster.kernels.cache_rows import LARGEST, as_bytes, packed, row_width, unpacked
from cluster.kernels.grouped_attention import GroupedAttention
from cluster.kernels.long_attention import LongSequence
from cluster.kernels.paged import attention_reference, write_kv

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}
each_form = pytest.mark.parametrize("form", list(LARGEST), ids=["int8", "fp8"])


def stored(cache, form):
    """A cache of numbers as one in 8 bits."""
    return packed(cache, form).view(form)


def meant(cache, dtype=torch.float32):
    """The numbers of a cache in 8 bits."""
    return unpacked(as_bytes(cache), cache.dtype, dtype)


def test_the_bytes_of_rows_worked_out_by_hand():
    """The largest is LARGEST itself, so the scale is 1, which is 0x3F80 in bfloat16, its lower byte first. Of int8 a
    half goes to the even neighbour; of e4m3 1.0625 lies between 1 (0x38) and 1.125, and 2^-9 is the least (0x01)."""
    whole = packed(torch.tensor([127.0, -63.5, 0.5, -1.2]), torch.int8)
    assert whole.tolist() == [127, -64, 0, -1, -0x80, 0x3F]
    small = packed(torch.tensor([448.0, 1.0625, -(2.0**-9), 0.0]), torch.float8_e4m3fn)
    assert small.view(torch.uint8).tolist() == [0x7E, 0x38, 0x81, 0, 0x80, 0x3F]
    assert unpacked(small, torch.float8_e4m3fn, torch.float32).tolist() == [448, 1, -(2.0**-9), 0]
    assert unpacked(torch.zeros(6, dtype=torch.int8), torch.int8, torch.float32).tolist() == [0, 0, 0, 0]


@each_form
@settings(max_examples=50, deadline=None)
@given(
    dtype=st.sampled_from(list(ROUNDING)), head_dim=st.sampled_from([2, 16, 64, 128]), seed=st.integers(0, 1 << 30),
    power=st.integers(-140, 125), spread=st.integers(0, 40),
)  # fmt: skip
def test_a_number_is_within_the_rounding_and_a_row_depends_on_itself_alone(form, dtype, head_dim, seed, power, spread):
    """Of int8 within half a scale, which is a 127th of the largest number and up to a 128th of itself more; of e4m3
    within a 16th of the number, or half of its least step."""
    draw = torch.Generator().manual_seed(seed)
    powers = power - torch.rand(5, head_dim, generator=draw) * spread
    if dtype == torch.float16:
        powers = powers.clamp(-20, 14)
    x = (torch.randn(5, head_dim, generator=draw).clamp(-2, 2).double() * 2.0 ** powers.double()).to(dtype)
    rows = packed(x, form)
    assert rows.shape == (5, row_width(head_dim, form))
    exactly = x.double()
    scale = torch.clamp(exactly.abs().amax(dim=-1, keepdim=True) / LARGEST[form], min=2.0**-126) * (1 + 2.0**-7)
    of_float8 = torch.maximum(exactly.abs() / 16, scale * 2.0**-10)
    bound = scale / 2 if form == torch.int8 else of_float8
    slack = 1 + 2.0**-20  # of float32, in which it is computed
    assert ((unpacked(rows, form, torch.float32).double() - exactly).abs() <= slack * bound + 2.0**-149).all()
    for i in range(5):
        assert torch.equal(packed(x[i : i + 1], form)[0], rows[i])


@each_form
@pytest.mark.parametrize("wild", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_not_finite_makes_its_row_nan_and_no_other(form, wild):
    x = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(1))
    sound = packed(x, form)
    x[1, 0, 5] = wild
    found = unpacked(packed(x, form), form, torch.float32)
    assert found[1, 0].isnan().all()
    others = torch.ones(3, 2, dtype=torch.bool)
    others[1, 0] = False
    assert torch.equal(packed(x, form)[others], sound[others])
    assert found[others].isfinite().all()


@each_form
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_writing_fills_the_slots_and_no_others(form, dtype):
    draw = torch.Generator().manual_seed(2)
    caches = [torch.zeros(3, 4, 2, row_width(8, form), dtype=torch.int8).view(form) for _ in range(2)]
    k, v = torch.randn(2, 5, 2, 8, generator=draw).to(dtype)
    slots = torch.tensor([7, 0, 11, 3, 4])
    write_kv(*caches, k, v, slots)
    for cache, x in zip(caches, (k, v), strict=True):
        flat = as_bytes(cache).flatten(0, 1)
        assert torch.equal(flat[slots], packed(x, form))
        flat[slots] = 0
        assert not flat.any()


prefills = st.lists(st.tuples(st.sampled_from([1, 2, 9, 40]), st.integers(0, 40)), min_size=1, max_size=3)
decodes = st.lists(st.tuples(st.just(1), st.integers(0, 70)), min_size=1, max_size=3)


@each_form
@settings(max_examples=20, deadline=None)
@given(
    lengths=st.one_of(prefills, decodes), window=st.sampled_from([None, None, 1, 5, 30]), seed=st.integers(0, 1 << 30),
    dtype=st.sampled_from(list(ROUNDING)), is_long=st.booleans(), groups=st.sampled_from([1, 4]),
)  # fmt: skip
def test_torchs_attention_is_the_definition_over_the_numbers_that_are_meant(
    form, lengths, window, seed, dtype, is_long, groups
):
    """Together, or each sequence a piece of keys at a time; all that is no sequence's token is NaN, but the padding
    block. The definition reads the same cache, and plain numbers, alike."""
    shape = Shape(block_size=4, kv_heads=2, groups=groups, head_dim=8)
    q, cache, batch = paged(lengths, shape, dtype, seed, torch.nan)
    cache[:, batch.padding_block] = 0
    rows = stored(cache, form)
    numbers = meant(rows)
    expected = exact(q, numbers, batch, window)
    plan = GroupedAttention(block_size=4, num_kv_heads=2, row_bytes=(1 << 25) if is_long else 64).plan(batch)
    assert all(isinstance(group, LongSequence) == is_long for group in plan.groups)
    found = plan.attend(q, *rows, scale=0.3, window=window)
    torch.testing.assert_close(found.float(), expected, atol=ROUNDING[dtype], rtol=ROUNDING[dtype])
    whole = attention_reference(q.float(), *rows, batch, scale=0.3, window=window)
    assert torch.equal(whole, attention_reference(q.float(), *numbers, batch, scale=0.3, window=window))


@each_form
def test_attention_is_as_near_to_that_over_the_own_numbers_as_the_rounding_lets_it_be(form):
    """A score is off by d = 0.3 * |q| times the errors of a key at most, so each weight by a factor of e^2d, and the
    answer by (e^2d - 1) times the largest value and the error of a value."""
    lengths = [(1, 300), (5, 60), (30, 0)]
    q, cache, batch = paged(lengths, Shape(16, 2, 4, 64), torch.float32, 5, 0.0)
    rows = stored(cache, form)
    off = (meant(rows) - cache).abs()
    key, value = off[0].flatten(0, 1).amax(dim=(0, 1)), off[1].max()
    worst = (0.3 * q.abs() * key).sum(dim=-1, keepdim=True)  # [T, Q, 1]
    unrounded = exact(q, cache, batch, None)
    found = GroupedAttention(block_size=16, num_kv_heads=2, row_bytes=64).plan(batch)
    found = found.attend(q, *rows, scale=0.3, window=None)
    error = (found - unrounded).abs()
    assert (error <= ((2 * worst).exp() - 1) * cache[1].abs().max() + value).all()
    assert 0 < error.max() < (0.06 if form == torch.int8 else 0.3), "of values that are normal"
