"""Brings back the rows of a lost call, or loses them. Knows `ShardCalls` and plans; knows no carrier.

R: rows of a leg, H: hidden size.
"""

import logging
from collections import deque
from dataclasses import dataclass
from enum import Enum, auto

import torch
from torch import Tensor

from cluster.errors import ShardUnavailable
from cluster.experts.calls import RETRY_INTERVAL_S, ShardCalls
from cluster.experts.deadline import Deadline
from cluster.experts.legs import Leg, Losses
from cluster.experts.receiver import Receiver
from cluster.experts.routing import PlanSource
from cluster.experts.transport import NOT_HERE, ExpertBatch

log = logging.getLogger(__name__)

# After a shard was lost, steps that can go on without its rows wait so long for its successor. A spare process takes
# its place in 0.2 s (BENCHMARKS.md).
LOST_S = 0.5


class Fate(Enum):
    """The fate of rows whose call failed, as far as it is known now."""

    COVERED = auto()  # all have another copy: they are sent there at once
    AWAITED = auto()  # some have none: they are sent again at the plan's next news, which may bring a successor
    LOST = auto()  # some have none, and the time to look for one is over: the others are sent again


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows whose call failed. rows: [R] int64 into the lost leg's rows.  batch: the call's."""

    shard_id: int
    batch: ExpertBatch
    rows: Tensor


class Recovery:
    """The recovery of one lost leg's rows. Used once.

    search: by when they have to find a living copy.  losses: with them rows may be lost instead, after LOST_S.
    """

    def __init__(
        self,
        lost: Leg,
        calls: ShardCalls,
        plans: PlanSource,
        *,
        search: Deadline,
        losses: Losses | None,
    ) -> None:
        self._lost = lost
        self._calls = calls
        self._plans = plans
        self._receiver = Receiver(calls)
        self._search = search
        self._losses = losses
        rows = lost.batch.hidden_states
        self._out = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
        self._parts = deque([_Part(lost.shard_id, lost.batch, torch.arange(rows.shape[0], device=rows.device))])

    def run(self) -> Tensor:
        """Blocks: [R, H] float32, zeros for lost rows. Raises ShardUnavailable where no row may be lost."""
        log.warning("shard %d is lost to layer %d; sending its rows again", self._lost.shard_id, self._layer_id)
        while self._parts:
            part = self._parts.popleft()
            alone = self._alone(part)
            deadline = self._deadline(part)
            fate = self._fate(alone, deadline)
            if fate is Fate.AWAITED:
                self._plans.wait_beyond(part.batch.epoch, min(RETRY_INTERVAL_S, deadline.left_s))
            elif fate is Fate.LOST:
                part = self._without(part, alone)
            if part.rows.numel():
                self._send_again(part)
        return self._out

    @property
    def _layer_id(self) -> int:
        return self._lost.batch.layer_id

    def _alone(self, part: _Part) -> Tensor:
        """The rows without another copy: [R] bool. Also rows that ask for no expert any more: a plan's only shard gets
        those too, and nobody needs them again."""
        return ~self._calls.routing.covered(part.shard_id, part.batch) | (part.batch.topk_ids == NOT_HERE).all(dim=1)

    def _deadline(self, part: _Part) -> Deadline:
        """By when rows without another copy have to find one."""
        if self._losses is None:
            return self._search
        since = self._calls.routing.lost_since(part.shard_id)
        return self._search.earlier((self._calls.clock() if since is None else since) + LOST_S)

    def _fate(self, alone: Tensor, deadline: Deadline) -> Fate:
        if not alone.any():
            return Fate.COVERED
        return Fate.LOST if deadline.is_over else Fate.AWAITED

    def _without(self, part: _Part, alone: Tensor) -> _Part:
        """Tells the step that the rows which are alone are lost; returns the others. Raises ShardUnavailable."""
        error = ShardUnavailable(
            f"shard {part.shard_id} did not answer for layer {self._layer_id} in {self._calls.recovery_timeout_s:g} s "
            f"(plan epoch {part.batch.epoch}) and its experts have no other copy: try again later",
            part.shard_id,
        )
        if self._losses is None:
            raise error
        gone = part.rows[alone]
        self._losses.lose(gone if self._lost.rows is None else self._lost.rows[gone], error)
        return _Part(part.shard_id, part.batch.of_rows(~alone), part.rows[~alone])

    def _send_again(self, part: _Part) -> None:
        """Adds the answers to the result. Rows whose call fails again are a new part."""
        batch = part.batch
        self._calls.metrics.rerouted(part.shard_id, part.rows.numel())
        for leg in self._calls.send(batch.layer_id, batch.hidden_states, batch.topk_ids, batch.topk_weights):
            rows = part.rows if leg.rows is None else part.rows[leg.rows]
            value = self._receiver.receive(leg, self._search, self._losses)
            if value is None:
                self._parts.append(_Part(leg.shard_id, leg.batch, rows))
            else:
                self._out.index_add_(0, rows, value)
