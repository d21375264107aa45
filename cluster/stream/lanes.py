"""An engine's usual crossing in native code: few rows to all shards of this host, and their sums (native/cross.cpp).

Knows connections and their memory; the choice of shards, and all that is unusual, is elsewhere (`experts/direct.py`).
T: tokens, K: experts a token, E: experts of a layer, H: hidden size.
"""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from ctypes import c_double, c_int32, c_int64, c_uint32, c_uint64, c_void_p

import numpy as np
import torch
from torch import Tensor

from cluster.experts.direct import MOST_ROWS, MOST_SLOTS, Crossed
from cluster.experts.transport import ExpertBatch, Flight
from cluster.kernels.native import library
from cluster.kernels.native.library import DTYPES
from cluster.stream.connection import StreamConnection
from cluster.stream.frames import HEADER

LANE_DTYPES = (torch.float32, torch.bfloat16)
LOG_SIZE = 1 << 12  # answers of a step, which is far fewer; older ones are forgotten

_SEND = (c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64)
_SUM = (c_void_p, c_void_p, c_int64, c_double)
MakeFlight = Callable[[StreamConnection, int, ExpertBatch], Flight]


class _Lane(ctypes.Structure):
    _fields_ = [
        ("rows", c_void_p), ("row_ids", c_void_p), ("num_rows", c_int64), ("request_id", c_uint64),
        ("sent_at", c_double), ("socket", c_int32), ("slot", c_uint32), ("got", ctypes.c_ubyte * HEADER.size),
        ("filled", c_int32),
    ]  # fmt: skip


class _Crossed(ctypes.Structure):
    _fields_ = [("lane", c_int64), ("rows", c_int64), ("round_trip_s", c_double), ("waited_s", c_double)]


class _Crossing(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("lanes", "shard_of", "sum", "frame", "log")),
        *((name, c_int64) for name in (
            "num_lanes", "num_layers", "num_experts", "hidden_size", "most_rows", "most_slots", "log_size", "logged",
        )),
        ("epoch", c_uint64), ("dtype", c_int32), ("timeout_ms", c_uint32),
    ]  # fmt: skip


def has_lanes() -> bool:
    """Whether native code for them is built, and for this system."""
    return library.function("moe_send", *_SEND) is not None


class StreamLanes:
    """As `direct.Lanes`. Each takes a slot of its connection's memory until `close`."""

    def __init__(
        self, connections: Sequence[StreamConnection], lane_of: np.ndarray, *, dtype: torch.dtype, hidden_size: int,
        epoch: int, timeout_s: float, is_open: Callable[[], bool], make_flight: MakeFlight,
    ) -> None:  # fmt: skip
        """connections: each with a free slot.  lane_of: [layers, E] int32, each expert's place among them."""
        send, add = library.function("moe_send", *_SEND), library.function("moe_sum", *_SUM)
        assert send is not None
        assert add is not None
        self._send, self._sum, self._is_open, self._make_flight = send, add, is_open, make_flight
        self._connections = list(connections)
        self.num_lanes, self.dtype, self.hidden_size = len(connections), dtype, hidden_size
        self._row_ids = torch.empty(len(connections), MOST_ROWS, dtype=torch.int64)
        self._values: list[Tensor] = []
        self._lanes = (_Lane * len(connections))()
        for lane, connection, row_ids in zip(self._lanes, connections, self._row_ids, strict=True):
            slot, values = connection.borrow_slot(MOST_ROWS, hidden_size, dtype)
            self._values.append(values)
            lane.rows, lane.row_ids, lane.socket, lane.slot = (
                values.data_ptr(), row_ids.data_ptr(), connection.fileno(), slot
            )  # fmt: skip
            lane.request_id = connection.last_lane_id
        self._lane_of = np.ascontiguousarray(lane_of, dtype=np.int32)
        self._total = torch.empty(MOST_ROWS, hidden_size, dtype=torch.float32)
        self._frame = torch.empty(HEADER.size + 8 * MOST_ROWS * MOST_SLOTS, dtype=torch.uint8)
        self._log = (_Crossed * LOG_SIZE)()
        self._state = _Crossing(
            lanes=ctypes.addressof(self._lanes), shard_of=self._lane_of.ctypes.data, sum=self._total.data_ptr(),
            frame=self._frame.data_ptr(), log=ctypes.addressof(self._log), num_lanes=len(connections),
            num_layers=lane_of.shape[0], num_experts=lane_of.shape[1], hidden_size=hidden_size, most_rows=MOST_ROWS,
            most_slots=MOST_SLOTS, log_size=LOG_SIZE, epoch=epoch, dtype=DTYPES[dtype],
            timeout_ms=int(timeout_s * 1000),
        )  # fmt: skip
        self._address = ctypes.addressof(self._state)
        self._read = 0

    @property
    def is_open(self) -> bool:
        return self._is_open()

    def send(self, layer_id: int, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> int:
        num_rows, num_slots = topk_ids.shape
        return self._send(
            self._address, layer_id, x.data_ptr(), x.stride(0) * x.itemsize, topk_ids.data_ptr(),
            topk_weights.data_ptr(), num_rows, num_slots,
        )  # fmt: skip

    def sum(self, out: Tensor, limit_s: float) -> int:
        return self._sum(self._address, out.data_ptr(), out.shape[0], limit_s)

    def most_rows(self) -> int:
        return int(max(lane.num_rows for lane in self._lanes))

    def rows(self, lane: int) -> Tensor:
        return self._row_ids[lane, : self._lanes[lane].num_rows].clone()

    def value(self, lane: int) -> Tensor:
        return self._values[lane][: self._lanes[lane].num_rows].clone()

    def crossed(self) -> list[Crossed]:
        first, self._read = max(self._read, self._state.logged - LOG_SIZE), self._state.logged
        log = [self._log[i % LOG_SIZE] for i in range(first, self._read)]
        return [Crossed(one.lane, one.rows, one.round_trip_s, one.waited_s) for one in log]

    def close(self, under_way: Mapping[int, ExpertBatch]) -> dict[int, Flight]:
        flights: dict[int, Flight] = {}
        for i, (lane, connection) in enumerate(zip(self._lanes, self._connections, strict=True)):
            connection.last_lane_id = lane.request_id
            if i in under_way:
                connection.adopt(lane.request_id, lane.slot, bytes(lane.got)[: lane.filled])
                flights[i] = self._make_flight(connection, lane.request_id, under_way[i])
            else:
                connection.return_slot(lane.slot)
        return flights
