"""Makes single calls to shards, asks for their answers, gives them up; keeps `Routing` and `Patience` informed.

T: tokens, H: hidden size, K: experts a token, R: rows for one shard.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from cluster.errors import ShardUnavailable
from cluster.experts.deadline import Deadline
from cluster.experts.legs import Leg
from cluster.experts.patience import Patience
from cluster.experts.placement import PlacementPlan
from cluster.experts.routing import Routing
from cluster.experts.transport import NOT_HERE, ExpertBatch, ExpertTransport
from cluster.metrics import DispatchMetrics

log = logging.getLogger(__name__)

RETRY_INTERVAL_S = 0.5  # between two looks for news of the plan; a respawn takes seconds (process start, loading)
SIGN_S = 2.0  # a shard that works has shown it in so long, on either carrier


class ShardCalls:
    """One dispatcher's calls. shard_timeout_s, recovery_timeout_s: as in `ExpertDispatcher`."""

    def __init__(
        self,
        transport: ExpertTransport,
        routing: Routing,
        metrics: DispatchMetrics,
        *,
        shard_timeout_s: float,
        recovery_timeout_s: float,
        clock: Callable[[], float],
    ) -> None:
        self.transport = transport
        self.routing = routing
        self.patience = Patience(shard_timeout_s)
        self.metrics = metrics
        self.shard_timeout_s = shard_timeout_s
        self.recovery_timeout_s = recovery_timeout_s
        self.clock = clock

    def send(
        self,
        layer_id: int,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        *,
        avoid: frozenset[int] = frozenset(),
    ) -> list[Leg]:
        """Sends rows to the shards of their experts without waiting; returns the legs in shard order.

        Shapes as in `ExpertDispatcher.dispatch`.  avoid: shards that get only rows that no other can compute.
        """
        plan = self.routing.plan()
        batch = ExpertBatch(
            layer_id=layer_id,
            epoch=plan.epoch,
            hidden_states=hidden_states,
            topk_ids=topk_ids,
            topk_weights=topk_weights,
        )
        if plan.num_shards == 1:  # nothing to select, and on a GPU nothing to wait for
            return [self.launch(0, None, batch)]
        on_host = _with_ids_on_host(batch)
        shard_of = self.routing.route(plan, layer_id, avoid).shards(on_host.topk_ids.numpy())
        return [self.launch(shard_id, rows, part) for shard_id, rows, part in _split(on_host, shard_of, plan)]

    def launch(self, shard_id: int, rows: Tensor | None, batch: ExpertBatch) -> Leg:
        """Sends a batch to a shard without waiting. rows: as of `Leg`."""
        flight = None
        try:
            flight = self.transport.submit(shard_id, batch)
            self.count(shard_id, batch.hidden_states.shape[0], batch.num_bytes)
        except ShardUnavailable as error:
            log.debug("layer %d: %s", batch.layer_id, error)
        now = self.clock()
        return Leg(shard_id, rows, batch, now, flight, now)

    def count(self, shard_id: int, num_rows: int, num_bytes: int) -> None:
        """Rows were sent."""
        self.metrics.sent(shard_id, num_rows, num_bytes)
        self.patience.sent()

    def ask(self, leg: Leg, timeout_s: float) -> Tensor | None:
        """Blocks for one leg's rows: [R, H] float32. None if they have not come; if they never will, the leg has no
        flight from then on."""
        if leg.flight is None:
            return None
        began = self.clock()
        try:
            value = leg.flight.result(timeout_s)
        except TimeoutError:
            return None
        except ShardUnavailable as error:
            log.debug("layer %d: %s", leg.batch.layer_id, error)
            leg.flight = None
            return None
        now = self.clock()
        leg.flight = None
        self.metrics.returned(leg.shard_id, now - leg.sent_at, value.nbytes)
        self.routing.answered(leg.shard_id)
        self.patience.answered(leg.num_rows, now - began)
        return value.float()

    def hear(self, leg: Leg, search: Deadline) -> bool:
        """Whether the leg's shard has shown since the last look that it works; then rows may look for a copy for longer
        (`search`). Ask when `ask` has returned None."""
        if leg.flight is None or not leg.flight.works():
            return False
        now, before = self.clock(), leg.heard_at
        if before - leg.sent_at < self.shard_timeout_s <= now - leg.sent_at:
            log.warning("shard %d works on layer %d for %g s", leg.shard_id, leg.batch.layer_id, self.shard_timeout_s)
        leg.heard_at = now
        search.postpone(now + self.recovery_timeout_s)
        return True

    def is_outdated(self, leg: Leg, now: float) -> bool:
        """Whether there is a newer plan, by which the shard may be another process by now: not while it works."""
        if now - leg.sent_at < RETRY_INTERVAL_S:
            return False
        plan = self.routing.plan()
        if plan.epoch <= leg.batch.epoch:
            return False
        return leg.shard_id in plan.down or leg.shard_id >= plan.num_shards or now - leg.heard_at >= SIGN_S

    def give_up(self, leg: Leg, *, silent: bool = False) -> None:
        """The leg's rows go elsewhere, and for a while so do others that can. silent: the reason to give it up."""
        leg.abandon()
        # A call by an older plan says nothing of its shard, which may be another process by now.
        if self.routing.plan().epoch <= leg.batch.epoch:
            self.routing.failed(leg.shard_id, heard_at=leg.heard_at, silent=silent)


def _with_ids_on_host(batch: ExpertBatch) -> ExpertBatch:
    """Ids and weights are on the CPU then: from a GPU with one wait for it."""
    if not batch.topk_ids.is_cuda:
        return batch
    ids, weights = (
        torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
        for tensor in (batch.topk_ids, batch.topk_weights)
    )
    torch.cuda.current_stream(batch.topk_ids.device).synchronize()
    return replace(batch, topk_ids=ids, topk_weights=weights)


def _split(
    batch: ExpertBatch, shard_of: np.ndarray, plan: PlacementPlan
) -> Iterator[tuple[int, Tensor | None, ExpertBatch]]:
    """Each shard's rows [R] int64, on the device of the hidden states, None for all of them, and its batch; all are
    selected at once.

    batch: with ids and weights on the CPU.  shard_of: [T, K].
    """
    num_rows = len(shard_of)
    asked = np.zeros((plan.num_shards + 1, num_rows), dtype=bool)
    asked[shard_of, np.arange(num_rows)[:, None]] = True  # NOT_HERE is the last one, which is no shard
    shards, host_rows = asked[:-1].nonzero()
    rows = torch.from_numpy(host_rows)
    device_rows = rows.to(batch.hidden_states.device, non_blocking=True)
    every = ExpertBatch(
        layer_id=batch.layer_id,
        epoch=batch.epoch,
        hidden_states=batch.hidden_states.index_select(0, device_rows),
        topk_ids=torch.where(torch.from_numpy(shard_of[host_rows] == shards[:, None]), batch.topk_ids[rows], NOT_HERE),
        topk_weights=batch.topk_weights[rows],
    )
    stops = np.bincount(shards, minlength=plan.num_shards).cumsum().tolist()
    for shard_id, (start, stop) in enumerate(pairwise((0, *stops))):
        if start < stop:
            part = slice(start, stop)
            yield shard_id, None if stop - start == num_rows else device_rows[part], every.of_rows(part)
