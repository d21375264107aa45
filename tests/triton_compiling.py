"""Compiles each of the GPU's kernels as it is launched, for processors that are not here. A program of its own: Triton
reads at its import whether it interprets.

Takes the compute capabilities as arguments; prints a line of JSON a kernel: `name`, `capability`, `shared_bytes`, and
whether it uses the matrix unit, `has_mma`, and loads 16 bytes at once, `has_wide_loads`.
"""

import json
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from cluster.config.quantization import QUANTIZATIONS, RowLayout
from cluster.kernels.gpu import attention, experts, fused, quantized
from cluster.kernels.paged import PagedBatch
from cluster.kernels.stack import Stack

DTYPE = torch.bfloat16
HIDDEN, WIDTH, TOKENS, TOPK, EXPERTS = 256, 128, 4, 2, 2


class NoDevice:
    """Triton's driver, as far as compiling asks for it."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability  # a cache for each

    def get_current_stream(self, device: int) -> int:
        return 0


def report_instead_of_launching() -> None:
    run = JITFunction.run

    def report(kernel: JITFunction, *args: Any, **options: Any) -> None:
        compiled = run(kernel, *args, **{**options, "warmup": True})
        ptx = compiled.asm["ptx"]
        line = {
            "name": compiled.name, "capability": compiled.metadata.target.arch,
            "shared_bytes": compiled.metadata.shared, "has_mma": "mma" in ptx,
            "has_wide_loads": "cp.async.cg" in ptx or "ld.global.v4" in ptx,
        }  # fmt: skip
        sys.stdout.write(json.dumps(line) + "\n")

    JITFunction.run = report


def zeros(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


def routed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, ids and weights."""
    return zeros(TOKENS, HIDDEN), zeros(TOKENS, TOPK, dtype=torch.int64), zeros(TOKENS, TOPK, dtype=torch.float32)


def stack_of(num_outputs: int, layout: RowLayout, num_orders: int) -> Stack:
    rows = zeros(EXPERTS, num_outputs, layout.row_bytes, dtype=torch.uint8)
    return Stack(rows, layout, zeros(EXPERTS, num_orders, layout.num_inputs, dtype=torch.int32) if num_orders else None)


def weights_in_fewer_bits() -> None:
    """Each way through the kernels once; of few rows for all experts and of many, of few rows of inputs and of many."""
    x, ids, weights = routed()
    for name, max_pairs in (("int4-128-zeros", experts.MAX_PAIRS), ("int4-32", 0)):
        layouts = [QUANTIZATIONS[name].layout(num_inputs) for num_inputs in (HIDDEN, WIDTH)]
        is_ordered = name == "int4-32"
        gate_up, down = stack_of(2 * WIDTH, layouts[0], 2 * is_ordered), stack_of(HIDDEN, layouts[1], is_ordered)
        quantized.experts(x, ids, weights, gate_up, down, max_pairs=max_pairs)
        quantized.linear(x if max_pairs else x.expand(100, TOKENS, HIDDEN).flatten(0, 1), gate_up.rows[0], layouts[0])
    for name in ("int8", "nf4"):
        layout = QUANTIZATIONS[name].layout(HIDDEN)
        quantized.linear(x, zeros(HIDDEN, layout.row_bytes, dtype=torch.uint8), layout, zeros(HIDDEN))
    quantized.linear(x.float(), gate_up.rows[0], layouts[0])


def weights_as_they_are() -> None:
    x, ids, weights = routed()
    gate_up, down = zeros(EXPERTS, 2 * WIDTH, HIDDEN), zeros(EXPERTS, HIDDEN, WIDTH)
    experts.experts_of_few_rows(x, ids, weights, gate_up, down)
    outer = experts.silu_mul(zeros(TOKENS * TOPK, 2 * HIDDEN))
    experts.combine(outer, ids, weights, ids.flatten())


def small_steps() -> None:
    heads, dim = 4, 128
    caches = zeros(4, 16, heads, dim), zeros(4, 16, heads, dim)
    slots = zeros(TOKENS, dtype=torch.int64)
    fused.rms_norm(zeros(TOKENS, HIDDEN), zeros(HIDDEN), 1e-6)
    rotary = zeros(TOKENS, 1, dim), zeros(TOKENS, 1, dim)
    q = fused.rotate_and_write(zeros(TOKENS, 3 * heads * dim), rotary, caches, slots)
    fused.route(zeros(TOKENS, 60), TOPK, normalized=True)
    fused.localize(slots.view(2, 2), slots, slots)
    batch = PagedBatch(
        query_lens=[1, 3], context_lens=[9, 3], block_tables=zeros(2, 4, dtype=torch.int64), slot_mapping=slots,
        context_lens_tensor=slots[:2], padding_block=3,
    )  # fmt: skip
    attention.PagedAttention(1).plan(batch).attend(q, *caches, scale=0.1, window=None)


if __name__ == "__main__":
    report_instead_of_launching()
    for given in sys.argv[1:]:
        driver.set_active(NoDevice(int(given)))
        weights_in_fewer_bits()
        weights_as_they_are()
        small_steps()
