"""Sends each row to the shards that hold its experts and adds what comes back. Knows plans; knows no carrier, no Ray.

Rows are kept until they are combined: a lost, hung or outdated shard costs a second sending, never an answer. Shards
keep nothing of a call, so that it can be made again anywhere.

`routing`: which shard gets a row.  `calls`: one call.  `receiver`: waits for it.  `recovery`: brings back its rows.
`patience`: how long answers may take.  `legs`: the values that these exchange.
T: tokens, H: hidden size, K: experts a token.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from cluster.experts.calls import ShardCalls
from cluster.experts.deadline import Deadline
from cluster.experts.direct import Direct, DirectFlight, LaneSource
from cluster.experts.legs import DispatchFlight, Leg, Losses, add_rows
from cluster.experts.receiver import Receiver
from cluster.experts.recovery import Recovery
from cluster.experts.routing import PlanSource, Routing
from cluster.experts.transport import ExpertTransport
from cluster.metrics import DispatchMetrics


class ExpertDispatcher:
    """One engine's way to all experts. Used by one thread.

    Rows of an expert with several copies are split between them. A copy that fails or is late is replaced by another
    at once; without another, rows wait for its successor.
    shard_timeout_s: a call without an answer or a sign of work for so long counts as lost. How long a shard computes
    does not matter: one that works is waited for.
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
        lanes: LaneSource | None = None,
    ) -> None:
        """lanes: the transport once more, if it has lanes."""
        self.transport = transport
        self.plans = plans
        self.metrics = metrics
        self.shard_timeout_s = shard_timeout_s
        self.recovery_timeout_s = recovery_timeout_s
        self.clock = clock
        self.routing = Routing(plans, clock)
        self.calls = ShardCalls(
            transport,
            self.routing,
            metrics,
            shard_timeout_s=shard_timeout_s,
            recovery_timeout_s=recovery_timeout_s,
            clock=clock,
        )
        self.receiver = Receiver(self.calls)
        self._direct = None if lanes is None else Direct(lanes, self.calls)

    @property
    def epoch(self) -> int:
        """Of the plan by which rows were sent last."""
        return self.routing.epoch

    def dispatch(
        self, layer_id: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, *, alone: bool = True
    ) -> DispatchFlight | DirectFlight:
        """Sends without waiting. hidden_states: [T, H]; topk_ids: [T, K] int64; topk_weights: [T, K] float32.

        alone: these are combined before anything else is dispatched.
        """
        if self._direct is not None and alone:
            direct = self._direct.dispatch(layer_id, hidden_states, topk_ids, topk_weights)
            if direct is not None:
                return direct
        return DispatchFlight(self.calls.send(layer_id, hidden_states, topk_ids, topk_weights), hidden_states)

    def combine(self, flight: DispatchFlight | DirectFlight, losses: Losses | None = None) -> Tensor:
        """Blocks for all legs: [T, H] in the rows' dtype, summed in float32 in shard order, whatever arrived first.

        Raises ShardUnavailable when some rows found no living copy in recovery_timeout_s. With `losses` these rows are
        lost instead, and sooner (`recovery.LOST_S`): their sums lack something.
        """
        if isinstance(flight, DirectFlight):
            out = None if losses is not None and losses.hung else flight.direct.combine(flight)
            if out is not None:
                return out
            flight = DispatchFlight(flight.direct.settle(flight), flight.batch.hidden_states)
        search = Deadline.after(self.clock, self.recovery_timeout_s)
        values = (self._value(leg, search, losses) for leg in flight.legs)
        if [leg.rows for leg in flight.legs] == [None]:  # of one shard; the carrier may use its memory again
            return next(values).to(flight.like.dtype, copy=True)
        out = torch.zeros(flight.like.shape, dtype=torch.float32, device=flight.like.device)
        for leg, value in zip(flight.legs, values, strict=True):
            add_rows(out, leg.rows, value)
        return out.to(flight.like.dtype)

    def account(self) -> None:
        """Reports what has crossed since the last time. Called between two steps."""
        if self._direct is not None:
            self._direct.account()

    def _value(self, leg: Leg, search: Deadline, losses: Losses | None) -> Tensor:
        """Blocks for one leg's rows: [R, H] float32, valid until the next leg's."""
        value = self.receiver.receive(leg, search, losses)
        if value is None:
            value = Recovery(leg, self.calls, self.plans, search=search, losses=losses).run()
        return value
