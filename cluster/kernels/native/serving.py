"""The native loop of a shard (serve.cpp): its structures, and the memory that they point to.

E: experts of a layer, H: hidden size.
"""

import ctypes
from collections.abc import Mapping
from ctypes import c_double, c_int32, c_int64, c_void_p
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cluster.kernels.experts import ExpertWeights, NativeStep
from cluster.kernels.native import library
from cluster.kernels.native.library import DTYPES, Native

MOST_ROWS = 256  # of a request; more are computed for so long that how they come counts for nothing
MOST_SLOTS = 16
BUFFER_BYTES, LOG_SIZE, HEAD_BYTES = 1 << 16, 1 << 12, 68
SERVED_DTYPES = (torch.float32, torch.bfloat16)
ASKED, UNUSUAL, UNSENT = range(3)  # outcomes of moe_serve


def can_serve() -> bool:
    """Whether the loop is built, and for this system."""
    return library.function("moe_serve", c_void_p) is not None


class _Layer(ctypes.Structure):
    _fields_ = [
        ("places", c_void_p), ("gate_up", c_void_p), ("down", c_void_p), ("counts", c_void_p),
        ("num_experts", c_int64), ("most_pairs", c_int64),
    ]  # fmt: skip


class _Served(ctypes.Structure):
    _fields_ = [("rows", c_int64), ("waited_s", c_double), ("computed_s", c_double)]


class _Serving(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("kernels", "layers", "slots", "buffer", "ids", "out", "scratch", "log")),
        *((name, c_int64) for name in (
            "num_layers", "num_experts", "hidden_size", "intermediate_size", "slot_bytes", "num_slots",
            "buffer_bytes", "most_rows", "most_slots", "log_size", "up_stride", "down_stride",
            "filled", "logged", "taken",
        )),
        *((name, c_int32) for name in (
            "socket", "wake", "dtype", "form", "least_timeout_ms", "threads", "stop", "computing",
        )),
        ("answer", ctypes.c_ubyte * HEAD_BYTES), ("unsent", c_int32),
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class ServedLayer:
    """places: [E + 1] int64, each expert's place in `weights`, -1 for one that is elsewhere.
    weights: stay while `step` is in use.
    """

    places: np.ndarray
    step: NativeStep
    weights: ExpertWeights


class Serving:
    """One shard's experts in all layers, and where requests are taken in. It lives while `serve` runs."""

    def __init__(
        self, native: Native, layers: Mapping[int, ServedLayer], dtype: torch.dtype, shape: tuple[int, ...]
    ) -> None:
        """layers: at least one, all of one form.  shape: layers of the model, E."""
        self._tokens = torch.zeros(shape, dtype=torch.int64)  # slots that each expert has computed
        self._reported = self._tokens.clone()
        first = next(iter(layers.values())).step.pointers
        most = max(len(layer.step.pointers) for layer in layers.values())
        table = (_Layer * (1 + max(layers)))()
        for layer_id, layer in layers.items():
            pointers = layer.step.pointers
            table[layer_id] = _Layer(
                layer.places.ctypes.data, pointers.gate_up.data_ptr(), pointers.down.data_ptr(),
                self._tokens[layer_id].data_ptr(), len(pointers), layer.step.most_pairs,
            )  # fmt: skip
        sizes = MOST_ROWS, MOST_SLOTS, most, first.hidden_size, first.intermediate_size
        if first.form:
            scratch_bytes = native.experts_quantized_scratch(DTYPES[dtype], first.form, *sizes)
        else:
            scratch_bytes = native.experts_scratch(DTYPES[dtype], *sizes)
        self._memory = {
            "buffer": torch.empty(BUFFER_BYTES, dtype=torch.uint8),
            "ids": torch.empty(MOST_ROWS * MOST_SLOTS, dtype=torch.int64),
            "out": torch.empty(MOST_ROWS, first.hidden_size, dtype=torch.float32),
            "scratch": torch.empty(scratch_bytes, dtype=torch.uint8),
        }
        self._log = (_Served * LOG_SIZE)()
        self._layers, self._table = dict(layers), table
        self._state = _Serving(
            kernels=native.table, layers=ctypes.addressof(table), log=ctypes.addressof(self._log),
            num_layers=len(table), num_experts=shape[1],
            hidden_size=first.hidden_size, intermediate_size=first.intermediate_size,
            buffer_bytes=BUFFER_BYTES, most_rows=MOST_ROWS, most_slots=MOST_SLOTS, log_size=LOG_SIZE,
            up_stride=first.row_bytes[0], down_stride=first.row_bytes[1], dtype=DTYPES[dtype], form=first.form,
            **{name: memory.data_ptr() for name, memory in self._memory.items()},
        )  # fmt: skip

    @property
    def computes(self) -> bool:
        return bool(self._state.computing)

    @property
    def num_served(self) -> int:
        """Requests since the start."""
        return int(self._state.logged)

    def stop(self) -> None:
        """`serve` comes back, or does not begin, until `start`. Any thread may call it."""
        self._state.stop = 1

    def start(self) -> None:
        self._state.stop = 0

    def serve(
        self, socket: int, wake: int, slots: Tensor, num_slots: int, *, least_timeout_s: float
    ) -> tuple[bytes, bytes]:
        """Blocks: answers a caller's requests until `stop`, until there is something to read at `wake`, or until he
        does anything else. Returns bytes that he sent, not taken yet, and bytes that he is still to get.

        slots: the memory that he shares, in num_slots pieces of one size.
        """
        state = self._state
        state.socket, state.wake, state.slots = socket, wake, slots.data_ptr()
        state.num_slots, state.slot_bytes = num_slots, slots.numel() // num_slots
        state.least_timeout_ms, state.threads = max(0, int(least_timeout_s * 1000)), torch.get_num_threads()
        run = library.function("moe_serve", c_void_p)
        assert run is not None
        outcome = run(ctypes.byref(state))
        ahead = ctypes.string_at(state.buffer, state.filled)
        state.filled = 0
        return ahead, bytes(state.answer)[HEAD_BYTES - state.unsent :] if outcome == UNSENT else b""

    def served(self) -> tuple[list[tuple[int, float, float]], Tensor]:
        """The requests since the last such question: each one's rows, seconds that they waited, seconds of their
        product; and the slots of each expert in them. For one thread at a time."""
        state = self._state
        first, stop = state.taken, state.logged
        found = [self._log[i % LOG_SIZE] for i in range(first, stop)]
        values = [(one.rows, one.waited_s, one.computed_s) for one in found]
        state.taken = stop
        before, self._reported = self._reported, self._tokens.clone()
        return values, self._reported - before
