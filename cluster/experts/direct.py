"""The usual crossing: few rows to shards that are all well, no expert with copies. Its carrier does it in two calls.

Whatever else happens becomes the legs of a `DispatchFlight`, as if `ShardCalls` had sent them: late answers, failures,
new plans, shards on other hosts. These stay the definition; the sums are the same to the last bit.
T: tokens, K: experts a token, E: experts of a layer, H: hidden size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from cluster.experts.calls import ShardCalls
from cluster.experts.legs import Leg
from cluster.experts.placement import PlacementPlan
from cluster.experts.transport import NOT_HERE, ExpertBatch, Flight, LocalFlight

MOST_ROWS, MOST_SLOTS = 256, 16  # a decode step, or one with a short prompt in it
REOPEN_S = 1.0  # between two tries to open lanes


class Crossed(NamedTuple):
    """An answer: of so many rows, so long after they were sent, and after it was waited for."""

    lane: int
    rows: int
    round_trip_s: float
    waited_s: float


class Lanes(Protocol):
    """A way to each of some shards, for one crossing at a time."""

    num_lanes: int
    dtype: torch.dtype
    hidden_size: int

    @property
    def is_open(self) -> bool: ...

    def send(self, layer_id: int, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> int:
        """As `ExpertDispatcher.dispatch`, at most MOST_ROWS x MOST_SLOTS, each row in one piece. Returns the lanes that
        have got their rows; those behind them got nothing. Negative: none has."""

    def sum(self, out: Tensor, limit_s: float) -> int:
        """Blocks for the answers, fills `out` [T, H]. Returns the lanes that have answered; the next one has not in
        limit_s, or not as it should."""

    def most_rows(self) -> int:
        """That were for one of them."""

    def rows(self, lane: int) -> Tensor:
        """The rows that were for it: [R] int64."""

    def value(self, lane: int) -> Tensor:
        """Its answer: [R, H]."""

    def crossed(self) -> list[Crossed]:
        """All answers since the last such question that became part of a sum."""

    def close(self, under_way: Mapping[int, ExpertBatch]) -> dict[int, Flight]:
        """The lanes are not used again. Returns a flight for each of these, whose answers have not come."""


class LaneSource(Protocol):
    def open_lanes(
        self, shard_ids: Sequence[int], lane_of: np.ndarray, *, dtype: torch.dtype, hidden_size: int, epoch: int
    ) -> Lanes | None:
        """None if not all of these shards can be reached so now. lane_of: [layers, E], places in shard_ids."""


@dataclass(slots=True)
class DirectFlight:
    """Rows under way on lanes; with `legs`, not any more: each `Leg` is as `ShardCalls` makes them."""

    direct: "Direct"
    batch: ExpertBatch
    num_sent: int
    sent_at: float
    legs: list[Leg] | None = None

    def abandon(self) -> None:
        for leg in self.direct.settle(self):
            leg.abandon()


class Direct:
    """One dispatcher's lanes. Used by one thread."""

    def __init__(self, source: LaneSource, calls: ShardCalls) -> None:
        self._source = source
        self._calls = calls
        self._lanes: Lanes | None = None
        self._plan: PlacementPlan | None = None  # of the lanes, or for which there are none
        self._shard_ids: list[int] = []
        self._retry_at = 0.0
        self._flight: DirectFlight | None = None
        self._lane_of = np.empty(0)
        self._num_slots = 0

    def dispatch(
        self, layer_id: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> DirectFlight | None:
        """As `ExpertDispatcher.dispatch`; None where this is not the usual case, and nothing is sent then."""
        if self._flight is not None:
            self.settle(self._flight)  # lanes are for one crossing at a time
            self._retry_at = self._calls.clock() + REOPEN_S
            return None
        lanes = self._ready(hidden_states, topk_ids, topk_weights)
        if lanes is None:
            return None
        sent_at, self._num_slots = self._calls.clock(), topk_ids.shape[1]
        num_sent = lanes.send(layer_id, hidden_states, topk_ids, topk_weights)
        if num_sent < 0:
            return None
        assert self._plan is not None
        batch = ExpertBatch(
            layer_id=layer_id, epoch=self._plan.epoch, hidden_states=hidden_states, topk_ids=topk_ids,
            topk_weights=topk_weights,
        )  # fmt: skip
        self._flight = flight = DirectFlight(self, batch, num_sent, sent_at)
        if num_sent < lanes.num_lanes:
            self.settle(flight)
        return flight

    def combine(self, flight: DirectFlight) -> Tensor | None:
        """As `ExpertDispatcher.combine`; None where the flight has legs to be combined."""
        if flight.legs is not None:
            return None
        assert self._lanes is not None
        out = torch.empty_like(flight.batch.hidden_states, memory_format=torch.contiguous_format)
        num_came = self._lanes.sum(out, self._calls.patience.late_s(self._lanes.most_rows()))
        if num_came < self._lanes.num_lanes:
            self.settle(flight, num_came)
            return None
        self._flight = None
        return out

    def settle(self, flight: DirectFlight, num_came: int = 0) -> list[Leg]:
        """Gives a flight its legs, if it has none yet, and closes the lanes. num_came: lanes that have answered."""
        if flight.legs is not None:
            return flight.legs
        if self._flight is not flight:  # its sum is known
            return []
        lanes, calls, batch = self._lanes, self._calls, flight.batch
        assert lanes is not None
        self.account()
        rows = [lanes.rows(i) for i in range(lanes.num_lanes)]
        parts = {i: self._part(batch, i, rows[i]) for i in range(lanes.num_lanes) if len(rows[i])}
        flights: dict[int, Flight] = {i: LocalFlight(lanes.value(i)) for i in parts if i < num_came}
        flights |= lanes.close({i: part for i, part in parts.items() if num_came <= i < flight.num_sent})
        self._lanes = self._flight = None
        flight.legs = []
        for i, part in parts.items():
            every = None if len(rows[i]) == batch.hidden_states.shape[0] else rows[i]
            if i in flights:
                calls.count(self._shard_ids[i], len(rows[i]), part.num_bytes)
                leg = Leg(self._shard_ids[i], every, part, flight.sent_at, flights[i], flight.sent_at)
            else:
                leg = calls.launch(self._shard_ids[i], every, part)
            flight.legs.append(leg)
        return flight.legs

    def account(self) -> None:
        """Reports the crossings since the last time to metrics and patience."""
        if self._lanes is None:
            return
        width, num_slots = self._lanes.hidden_size * self._lanes.dtype.itemsize, self._num_slots
        for one in self._lanes.crossed():
            shard_id, num_bytes = self._shard_ids[one.lane], one.rows * width
            self._calls.count(shard_id, one.rows, num_bytes + one.rows * num_slots * 12)
            self._calls.metrics.returned(shard_id, one.round_trip_s, num_bytes)
            self._calls.patience.answered(one.rows, one.waited_s)

    def _ready(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Lanes | None:
        """Lanes by the current plan, for rows such as these."""
        routing = self._calls.routing
        plan = routing.plan()
        if x.is_cuda or x.shape[0] > MOST_ROWS or topk_ids.shape[1] > MOST_SLOTS or not routing.is_calm:
            return None
        if not (x.stride(1) == 1 and topk_ids.is_contiguous() and topk_weights.is_contiguous()):
            return None
        lanes = self._lanes
        if plan is not self._plan or lanes is None or not lanes.is_open:
            lanes = self._open(plan, x)
        return lanes if lanes is not None and (lanes.dtype, lanes.hidden_size) == (x.dtype, x.shape[1]) else None

    def _open(self, plan: PlacementPlan, x: Tensor) -> Lanes | None:
        """New lanes, if the plan is of the usual kind, and not soon after a failure."""
        now = self._calls.clock()
        self.account()
        if self._lanes is not None:
            self._lanes.close({})
            self._lanes = None
        if plan is self._plan and now < self._retry_at:
            return None
        self._plan, self._retry_at = plan, now + REOPEN_S
        owners = {layer_id: plan.owners(layer_id) for layer_id in plan.layer_ids}
        if plan.down or any(len(copies) > 1 for layer in owners.values() for copies in layer):
            return None
        self._shard_ids = sorted({copies[0] for layer in owners.values() for copies in layer})
        self._lane_of = np.zeros((1 + max(owners), plan.num_experts), dtype=np.int32)
        for layer_id, layer in owners.items():
            self._lane_of[layer_id] = [self._shard_ids.index(copies[0]) for copies in layer]
        self._lanes = self._source.open_lanes(
            self._shard_ids, self._lane_of, dtype=x.dtype, hidden_size=x.shape[1], epoch=plan.epoch
        )
        if self._lanes is not None:
            self._retry_at = 0.0
        return self._lanes

    def _part(self, batch: ExpertBatch, lane: int, rows: Tensor) -> ExpertBatch:
        """The rows that a lane got, as it got them."""
        ids = batch.topk_ids[rows]
        is_here = torch.from_numpy(self._lane_of[batch.layer_id][ids.clamp_min(0).numpy()] == lane) & (ids >= 0)
        return replace(
            batch,
            hidden_states=batch.hidden_states[rows],
            topk_ids=torch.where(is_here, ids, NOT_HERE),
            topk_weights=batch.topk_weights[rows],
        )
