"""Linear layers with weights in 8 and 4 bits. M: rows, N: outputs, K: inputs, G: groups of a row."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from cluster.bench.kernels.case import TORCH, Call, Case
from cluster.bench.kernels.products import shapes_of
from cluster.bench.kernels.reading import num_turns
from cluster.config import ModelConfig
from cluster.config.quantization import RowLayout
from cluster.kernels.native.library import Native, native
from cluster.kernels.native_products import linear_quantized
from cluster.kernels.rounding import Numbers, pack, quantize

_GROUP_SIZE = 128  # as the released GPTQ checkpoints have it


def quantized_cases(
    config: ModelConfig, dtype: torch.dtype, batches: tuple[int, ...], kernels: Mapping[str, Native]
) -> Iterator[Case]:
    """The layers between attention and lm_head, which is not quantized."""
    chosen = native()
    for name, (num_outputs, num_inputs) in list(shapes_of(config).items())[2:4]:
        for layout in (RowLayout(8, num_inputs), RowLayout(4, num_inputs, _GROUP_SIZE)):
            numbers = quantize(torch.randn(num_outputs, num_inputs), layout)
            rows = pack(numbers, layout)
            every = [rows] + [rows.clone() for _ in range(num_turns(rows.nbytes) - 1)]
            takes = dtype == torch.bfloat16 and (layout.num_bits == 8 or _TorchProduct.takes(num_outputs, num_inputs))
            theirs = [_TorchProduct(numbers) for _ in every] if takes else []
            for batch in batches:
                x = torch.randn(batch, num_inputs, dtype=dtype)
                ways: dict[str, Call] = {TORCH: _by_torch(theirs, x)} if theirs else {}
                ways |= {way: _by_kernel(one, every, x, layout) for way, one in kernels.items()}
                yield Case(
                    kernel=f"int{layout.num_bits} {name}, {num_outputs} x {num_inputs}",
                    size=f"batch {batch}",
                    ways=ways,
                    num_bytes=float(rows.nbytes),
                    num_flops=2.0 * batch * num_outputs * num_inputs,
                    chosen=TORCH if chosen is None else chosen.variant,
                )


class _TorchProduct:
    """torch's own product with one matrix of 8 or 4 bits; bfloat16 alone. x: [M, K]. Returns [M, N]."""

    def __init__(self, numbers: Numbers) -> None:
        self._is_int8 = numbers.scales is None
        if numbers.scales is None:
            self._weight, self._scales = numbers.numbers.clone(), numbers.factors.bfloat16()
            return
        unsigned = (numbers.numbers.to(torch.int32) + 8).contiguous()
        self._weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 2)
        scales = (numbers.scales.float() * numbers.factors.unsqueeze(1)).t()  # [G, N]
        self._scales = torch.stack([scales, torch.zeros_like(scales)], dim=-1).bfloat16().contiguous()

    @staticmethod
    def takes(num_outputs: int, num_inputs: int) -> bool:
        """Whether torch has a product in 4 bits for such a matrix."""
        return num_inputs % _GROUP_SIZE == 0 and num_outputs % 64 == 0

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor
        if self._is_int8:
            out = torch.ops.aten._weight_int8pack_mm(x, self._weight, self._scales)
        else:
            out = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self._weight, _GROUP_SIZE, self._scales)
        return out


def _by_torch(products: Sequence[_TorchProduct], x: Tensor) -> Call:
    return lambda turn: products[turn % len(products)](x)


def _by_kernel(kernel: Native, every: Sequence[Tensor], x: Tensor, layout: RowLayout) -> Call:
    return lambda turn: linear_quantized(kernel, x, every[turn % len(every)], None, layout.form)
