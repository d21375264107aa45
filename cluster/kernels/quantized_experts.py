"""Experts in 8 or 4 bits on a GPU. Knows neither layers nor files.

L: experts, H: hidden size, I: expert intermediate size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cluster.config.quantization import Quantization
from cluster.kernels.stack import Stack
from cluster.kernels.stored import weight_in
from cluster.kernels.weights import Weight


class QuantizedStacks:
    """`ExpertWeights` that `gpu/quantized.py` multiplies. They stand side by side in memory; `rearranged` copies them.

    dtype: of the checkpoint's matrices, where these are plain.
    """

    def __init__(self, gate_up: Stack, down: Stack, quantization: Quantization, dtype: torch.dtype) -> None:
        self._gate_up, self._down = gate_up, down
        self._quantization, self._dtype = quantization, dtype
        self.gate_up, self.down = self._weights(gate_up), self._weights(down)

    @classmethod
    def empty(
        cls, gate_up: tuple[int, int], down: tuple[int, int], *, quantization: Quantization, dtype: torch.dtype,
        device: torch.device,
    ) -> "QuantizedStacks":  # fmt: skip
        """No experts. gate_up: 2 I and H.  down: H and I."""
        stacks = []
        for (num_outputs, num_inputs), num_matrices in ((gate_up, 2), (down, 1)):
            layout = quantization.layout(num_inputs)
            rows = torch.empty(0, num_outputs, layout.row_bytes, dtype=torch.uint8, device=device)
            orders = torch.empty(0, num_matrices, num_inputs, dtype=torch.int32, device=device)
            stacks.append(Stack(rows, layout, orders if quantization.is_ordered else None))
        return cls(stacks[0], stacks[1], quantization, dtype)

    @property
    def native_step(self) -> None:
        """None: no native kernel computes a step."""

    def rearranged(self, places: Sequence[int | None]) -> "QuantizedStacks":
        stacks = self._gate_up.rearranged(places), self._down.rearranged(places)
        return QuantizedStacks(*stacks, self._quantization, self._dtype)

    def forward(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        from cluster.kernels.gpu.quantized import experts  # only GPUs have Triton

        return experts(hidden_states, topk_ids, topk_weights, self._gate_up, self._down)

    def _weights(self, stack: Stack) -> list[Weight]:
        """Each expert's, which fills its place in the stack."""
        orders = [None] * len(stack.rows) if stack.orders is None else list(stack.orders)
        return [
            weight_in(rows, stack.layout, of_expert, quantization=self._quantization, dtype=self._dtype)
            for rows, of_expert in zip(stack.rows, orders, strict=True)
        ]
