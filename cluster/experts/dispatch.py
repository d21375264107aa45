"""Sends each row to the shards that hold its experts and adds what comes back. Knows plans; knows no carrier, no Ray.

Satisfies the `Experts` protocol of `model/moe.py`. Rows are kept until they are combined: a lost, hung or outdated
shard costs a second sending, never an answer.
T: tokens, H: hidden size, K: experts a token, E: experts of a layer, R: rows for one shard.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cluster.errors import ShardUnavailable
from cluster.experts.placement import PlacementPlan
from cluster.experts.transport import NOT_HERE, ExpertBatch, ExpertTransport, Flight
from cluster.metrics import DispatchMetrics

log = logging.getLogger(__name__)

RETRY_INTERVAL_S = 0.5  # how long a resend waits for news of the plan; a respawn takes seconds (process start, load)


class PlanSource(Protocol):
    """Where the current plan is read. Both methods may be called from any thread."""

    def current(self) -> PlacementPlan: ...

    def wait_beyond(self, epoch: int, timeout_s: float) -> bool:
        """Blocks until a plan with a higher epoch is current; false when the time is over first."""


class FixedPlan:
    """A plan that never changes: shards in this process."""

    def __init__(self, plan: PlacementPlan) -> None:
        self._plan = plan

    def current(self) -> PlacementPlan:
        return self._plan

    def wait_beyond(self, epoch: int, timeout_s: float) -> bool:
        return self._plan.epoch > epoch


@dataclass(slots=True)
class Leg:
    """One shard's part of a flight. rows: [R] int64 into the sender's rows, None for all of them.
    flight: None if it could not be sent."""

    shard_id: int
    rows: Tensor | None
    batch: ExpertBatch
    sent_at: float
    flight: Flight | None


@dataclass(frozen=True, slots=True)
class DispatchFlight:
    """What `combine` needs: the legs in shard order, and the shape and dtype of the answer."""

    legs: list[Leg]
    like: Tensor


class ExpertDispatcher:
    """One engine's way to all experts. Used by one thread.

    shard_timeout_s: a call without an answer for so long counts as lost.
    recovery_timeout_s: how long rows look for a living copy before their step fails.
    """

    def __init__(
        self,
        transport: ExpertTransport,
        plans: PlanSource,
        metrics: DispatchMetrics,
        *,
        shard_timeout_s: float = 30.0,
        recovery_timeout_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.transport = transport
        self.plans = plans
        self.metrics = metrics
        self.shard_timeout_s = shard_timeout_s
        self.recovery_timeout_s = recovery_timeout_s
        self.clock = clock
        self._owners: dict[int, Tensor] = {}
        self._epoch = 0

    def dispatch(self, layer_id: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> DispatchFlight:
        """Sends without waiting. hidden_states: [T, H]; topk_ids: [T, K] int64; topk_weights: [T, K] float32."""
        return DispatchFlight(self._send(layer_id, hidden_states, topk_ids, topk_weights), hidden_states)

    def combine(self, flight: DispatchFlight) -> Tensor:
        """Blocks for all legs: [T, H] in the rows' dtype, summed in float32 in shard order, whatever arrived first.

        Raises ShardUnavailable when some rows found no living copy in recovery_timeout_s.
        """
        out = torch.zeros(flight.like.shape, dtype=torch.float32, device=flight.like.device)
        deadline = self.clock() + self.recovery_timeout_s
        for leg in flight.legs:
            value = self._receive(leg, deadline)
            _add(out, leg.rows, self._recover(leg, deadline) if value is None else value)
        return out.to(flight.like.dtype)

    def _send(self, layer_id: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> list[Leg]:
        plan = self._current_plan()
        if plan.num_shards == 1:  # nothing to select, and on a GPU nothing to wait for
            batch = ExpertBatch(
                layer_id=layer_id,
                epoch=plan.epoch,
                hidden_states=hidden_states,
                topk_ids=topk_ids,
                topk_weights=topk_weights,
            )
            return [self._launch(0, None, batch)]
        shard_of = torch.where(
            topk_ids >= 0, self._owner(plan, layer_id, topk_ids.device)[topk_ids.clamp_min(0)], NOT_HERE
        )  # [T, K]
        legs = []
        for shard_id in range(plan.num_shards):
            mine = shard_of == shard_id
            rows = mine.any(dim=1).nonzero().squeeze(1)
            if not rows.numel():
                continue
            batch = ExpertBatch(
                layer_id=layer_id,
                epoch=plan.epoch,
                hidden_states=hidden_states[rows],
                topk_ids=torch.where(mine, topk_ids, NOT_HERE)[rows],
                topk_weights=topk_weights[rows],
            )
            legs.append(self._launch(shard_id, rows, batch))
        return legs

    def _launch(self, shard_id: int, rows: Tensor | None, batch: ExpertBatch) -> Leg:
        flight = None
        try:
            flight = self.transport.submit(shard_id, batch)
            self.metrics.sent(shard_id, batch.hidden_states.shape[0], batch.num_bytes)
        except ShardUnavailable as error:
            log.debug("layer %d: %s", batch.layer_id, error)
        return Leg(shard_id, rows, batch, self.clock(), flight)

    def _receive(self, leg: Leg, deadline: float) -> Tensor | None:
        """Blocks for one leg's rows: [R, H] float32, or None when its shard is lost."""
        if leg.flight is None:
            return None
        try:
            value = leg.flight.result(min(self.shard_timeout_s, max(0.0, deadline - self.clock())))
        except ShardUnavailable as error:
            log.debug("layer %d: %s", leg.batch.layer_id, error)
            return None
        self.metrics.returned(leg.shard_id, self.clock() - leg.sent_at, value.nbytes)
        return value.float()

    def _recover(self, lost: Leg, deadline: float) -> Tensor:
        """Sends a lost leg's rows again, as the plan of the moment says, until all are back: [R, H] float32."""
        batch = lost.batch
        log.warning("shard %d is lost to layer %d; sending its rows again", lost.shard_id, batch.layer_id)
        out = torch.zeros(batch.hidden_states.shape, dtype=torch.float32, device=batch.hidden_states.device)
        open_legs = [(torch.arange(out.shape[0], device=out.device), lost)]
        while open_legs:
            rows, leg = open_legs.pop(0)
            remaining = deadline - self.clock()
            if remaining <= 0:
                raise ShardUnavailable(
                    f"shard {leg.shard_id} did not answer for layer {batch.layer_id} in {self.recovery_timeout_s:g} s "
                    f"(plan epoch {leg.batch.epoch}) and its experts have no other copy: try again later",
                    leg.shard_id,
                )
            self.plans.wait_beyond(leg.batch.epoch, min(RETRY_INTERVAL_S, remaining))
            self.metrics.rerouted(leg.shard_id, rows.numel())
            kept = leg.batch
            for again in self._send(kept.layer_id, kept.hidden_states, kept.topk_ids, kept.topk_weights):
                value = self._receive(again, deadline)
                own = rows if again.rows is None else rows[again.rows]
                if value is None:
                    open_legs.append((own, again))
                else:
                    out.index_add_(0, own, value)
        return out

    def _owner(self, plan: PlacementPlan, layer_id: int, device: torch.device) -> Tensor:
        """[E] int64: the shard that computes each expert of a layer, its first copy."""
        if layer_id not in self._owners:
            self._owners[layer_id] = torch.tensor([shards[0] for shards in plan.owners(layer_id)], device=device)
        return self._owners[layer_id]

    def _current_plan(self) -> PlacementPlan:
        plan = self.plans.current()
        if plan.epoch != self._epoch:
            self._epoch = plan.epoch
            self._owners = {}
            self.metrics.plan_epoch(plan.epoch)
        return plan


def _add(out: Tensor, rows: Tensor | None, value: Tensor) -> None:
    """out: [T, H].  rows: [R], None for all.  value: [R, H]."""
    if rows is None:
        out.add_(value)
    else:
        out.index_add_(0, rows, value)
