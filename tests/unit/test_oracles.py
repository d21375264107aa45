"""Rounding and packing by others' own packages: bitsandbytes' nf4 and compressed-tensors' pack-quantized."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stored_tools import DENSE, write_packed
from transformers import AutoModelForCausalLM
from weight_tools import settled

from cluster import LLM
from cluster.config.packed import Packed
from cluster.config.quantization import RowLayout
from cluster.kernels import nf4
from cluster.kernels.nf4 import Nf4Weight
from cluster.kernels.quantized import new_rows

bitsandbytes = pytest.importorskip("bitsandbytes.functional")
compressors = pytest.importorskip("compressed_tensors.compressors")
schemes = pytest.importorskip("compressed_tensors.quantization")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3), blocks=st.integers(1, 30), seed=st.integers(0, 99),
    dtype=st.sampled_from(DTYPES), magnitude=st.sampled_from([1e-4, 0.02, 3.0]), with_zeros=st.booleans(),
)  # fmt: skip
@example(sizes=[3], blocks=320, seed=1, dtype=torch.bfloat16, magnitude=0.02, with_zeros=False)
def test_nf4_is_that_of_bitsandbytes_bit_for_bit(sizes, blocks, seed, dtype, magnitude, with_zeros):
    """Matrices one above another, each by itself: levels, scales, nested scales, offset, and what they mean."""
    draw = torch.Generator().manual_seed(seed)
    matrices = {
        f"m{i}": (torch.randn(n, 64 * blocks, generator=draw) * magnitude).to(dtype) for i, n in enumerate(sizes)
    }
    if with_zeros:
        matrices["m0"][:, :64] = 0
    means = []
    for matrix in matrices.values():
        packed, state = bitsandbytes.quantize_4bit(matrix, compress_statistics=True, quant_type="nf4")
        found = nf4.quantize(matrix)
        numbers = found.numbers.flatten()
        assert torch.equal(numbers[::2] << 4 | numbers[1::2], packed.flatten())
        assert torch.equal(found.scales.flatten(), state.absmax)
        assert torch.equal(found.nested, state.state2.absmax)
        assert torch.equal(found.offset, state.offset)
        state.dtype = torch.float32
        means.append(bitsandbytes.dequantize_4bit(packed, state))
    layout = RowLayout(4, 64 * blocks, 64, is_nf4=True)
    weight = Nf4Weight(new_rows(sum(sizes), layout), layout, dtype)
    parts = {name: len(matrix) for name, matrix in matrices.items()}
    targets = weight.targets(parts, torch.empty(weight.staging_bytes, dtype=torch.uint8))
    for name, matrix in matrices.items():
        targets[f"{name}.weight"].copy_(matrix)
    weight.settle()
    assert torch.equal(weight.dequantized(), torch.cat(means))


def test_the_map_of_scales_is_that_of_bitsandbytes():
    assert torch.equal(nf4.dynamic_map(), bitsandbytes.create_dynamic_map())


@pytest.mark.parametrize("num_bits", [8, 4])
@pytest.mark.parametrize("group_size", [None, 32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_that_compressed_tensors_packed_means_the_same(num_bits, group_size, symmetric, dtype):
    if num_bits == 8 and not symmetric:
        return
    draw = torch.Generator().manual_seed(num_bits)
    matrix = torch.randn(24, 256, generator=draw) * 0.1
    num_groups = 256 // group_size if group_size else 1
    scales = (matrix.view(24, num_groups, -1).abs().amax(2) / 2 ** (num_bits - 1)).to(dtype)
    args = schemes.QuantizationArgs(
        num_bits=num_bits, type="int", symmetric=symmetric, strategy="group" if group_size else "channel",
        group_size=group_size,
    )  # fmt: skip
    scheme = schemes.QuantizationScheme(targets=["Linear"], weights=args)
    state = {"weight": matrix.to(dtype), "weight_scale": scales}
    if not symmetric:
        state["weight_zero_point"] = torch.randint(-8, 8, scales.shape, generator=draw).to(torch.int8)
    compressor = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    packed = compressor.compress(state, scheme)
    theirs = compressor.decompress({**packed, "weight_scale": scales.float()}, scheme)["weight"]
    weight = settled(Packed(num_bits, group_size or 0, symmetric), {"w": matrix}, {"w": packed})
    torch.testing.assert_close(weight.dequantized(), theirs, rtol=2**-10 if dtype != torch.float16 else 1e-6, atol=1e-6)


@pytest.mark.parametrize("num_bits", [8, 4])
def test_transformers_reads_the_same_from_a_checkpoint_of_compressed_tensors(tmp_path, num_bits):
    stored, _ = write_packed(tmp_path, DENSE, num_bits, None if num_bits == 8 else 32)
    model = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.float32, attn_implementation="eager").eval()
    prompt = [5, 9, 17, 33, 120, 7]
    with LLM(stored, dtype="float32", device="cpu", skip_tokenizer=True, kv_cache_bytes=1 << 22) as llm:
        with torch.inference_mode():
            expected = model(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(llm.logits(prompt), expected, atol=2e-3, rtol=0)
