"""Sends each row to the shards that hold its experts and adds what comes back. Knows plans; knows no carrier, no Ray.

Rows are kept until they are combined: a lost, hung or outdated shard costs a second sending, never an answer. Shards
keep nothing of a call, so that it can be made again anywhere.
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
from cluster.experts.routing import Route
from cluster.experts.transport import NOT_HERE, ExpertBatch, ExpertTransport, Flight
from cluster.metrics import DispatchMetrics

log = logging.getLogger(__name__)

RETRY_INTERVAL_S = 0.5  # how long a resend waits for news of the plan; a respawn takes seconds (process start, load)
HEDGE_FLOOR_S = 0.1  # rows go to another copy at the earliest after so long: 50 times a healthy round trip (1 to 2 ms)
HEDGE_CEILING_S = 5.0  # and at the latest after so long
HEDGE_UNKNOWN_S = 1.0  # before anything is known
HEDGE_SHARE = 0.05  # of all sendings may be such second ones, so that a slow cluster is not loaded twice
HEDGE_BURST = 10.0
TURN_S = 0.01  # how long a hedged call waits at one of its copies before it looks at the other
SUSPECT_S = (1.0, 2.0, 4.0, 8.0, 16.0)  # a shard that failed n calls in a row gets no rows that have another copy
SIGN_S = 2.0  # a shard that works has shown it in so long, on either carrier
LOST_S = 0.5  # so long after a shard was lost the steps that can go on without it wait for its successor; a spare
# process takes its place in 0.2 s (BENCHMARKS.md)
HUNG_S = 5.0  # such steps wait so long for a shard that let shard_timeout_s pass, the next ones twice as long, …


class Losses(Protocol):
    """A step that can go on without some of its rows. hung: (epoch, shard) whose answer it has waited for in vain."""

    hung: set[tuple[int, int]]

    def lose(self, rows: Tensor, error: ShardUnavailable) -> None:
        """rows: [R] int64 into a flight's rows, which cannot be computed now."""


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
    flight: None if it could not be sent.  heard_at: when its shard last showed that it works, or it was sent."""

    shard_id: int
    rows: Tensor | None
    batch: ExpertBatch
    sent_at: float
    flight: Flight | None
    heard_at: float = 0.0


@dataclass(frozen=True, slots=True)
class DispatchFlight:
    """What `combine` needs: the legs in shard order, and the shape and dtype of the answer."""

    legs: list[Leg]
    like: Tensor

    def abandon(self) -> None:
        """Nobody will combine it."""
        for leg in self.legs:
            if leg.flight is not None:
                leg.flight.abandon()
                leg.flight = None


@dataclass(slots=True)
class Search:
    """How long rows of one combination may look for a living copy: until `until`, and anew after each sign of work."""

    until: float


@dataclass(slots=True)
class _Suspect:
    """A shard that failed calls in a row, `timeouts` of them by silence: until `until` it gets no rows that another one
    can compute."""

    failures: int = 0
    timeouts: int = 0
    until: float = 0.0


@dataclass(slots=True)
class _Waits:
    """What recent waits for an answer took, and what is longer than usual: mean plus four mean deviations, as TCP
    decides when to send again (RFC 6298, with its 1/8 and 1/4)."""

    mean_s: float = -1.0
    deviation_s: float = 0.0

    def add(self, seconds: float) -> None:
        if self.mean_s < 0:
            self.mean_s, self.deviation_s = seconds, seconds / 2
        else:
            self.deviation_s += (abs(seconds - self.mean_s) - self.deviation_s) / 4
            self.mean_s += (seconds - self.mean_s) / 8

    @property
    def limit_s(self) -> float:
        return self.mean_s + 4 * self.deviation_s


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
    ) -> None:
        self.transport = transport
        self.plans = plans
        self.metrics = metrics
        self.shard_timeout_s = shard_timeout_s
        self.recovery_timeout_s = recovery_timeout_s
        self.clock = clock
        self._routes: dict[tuple[int, frozenset[int], frozenset[int]], Route] = {}
        self._epoch = 0
        self._suspects: dict[int, _Suspect] = {}
        self._lost_since: dict[int, float] = {}
        self._waits: dict[int, _Waits] = {}  # by the number of bits in the number of rows
        self._hedges = HEDGE_BURST

    @property
    def epoch(self) -> int:
        """Of the plan by which rows were sent last."""
        return self._epoch

    def dispatch(self, layer_id: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> DispatchFlight:
        """Sends without waiting. hidden_states: [T, H]; topk_ids: [T, K] int64; topk_weights: [T, K] float32."""
        return DispatchFlight(self._send(layer_id, hidden_states, topk_ids, topk_weights), hidden_states)

    def combine(self, flight: DispatchFlight, losses: Losses | None = None) -> Tensor:
        """Blocks for all legs: [T, H] in the rows' dtype, summed in float32 in shard order, whatever arrived first.

        Raises ShardUnavailable when some rows found no living copy in recovery_timeout_s. Where there may be `losses`
        these rows are lost instead, after LOST_S: their sums lack something.
        """
        out = torch.zeros(flight.like.shape, dtype=torch.float32, device=flight.like.device)
        search = Search(self.clock() + self.recovery_timeout_s)
        for leg in flight.legs:
            value = self._receive(leg, search, losses)
            _add(out, leg.rows, self._recover(leg, search, losses) if value is None else value)
        return out.to(flight.like.dtype)

    def _send(
        self,
        layer_id: int,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        avoid: frozenset[int] = frozenset(),
    ) -> list[Leg]:
        """avoid: shards that get only rows that no other can compute."""
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
        shard_of = self._route(plan, layer_id, avoid, topk_ids.device).shards(topk_ids)  # [T, K]
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
            self._hedges = min(HEDGE_BURST, self._hedges + HEDGE_SHARE)
        except ShardUnavailable as error:
            log.debug("layer %d: %s", batch.layer_id, error)
        now = self.clock()
        return Leg(shard_id, rows, batch, now, flight, now)

    def _receive(self, leg: Leg, search: Search, losses: Losses | None = None) -> Tensor | None:
        """Blocks for one leg's rows: [R, H] float32, or None when they have to be sent again."""
        value: Tensor | None = None
        limit_s, began = self._limit_s(leg, losses), self.clock()
        # What came while another leg was waited for lies there, and is read.
        lost_at = min(max(leg.sent_at + limit_s, began + SIGN_S), search.until) if limit_s else began
        late_at: float | None = began + self._patience_s(leg)
        while value is None and leg.flight is not None and (now := self.clock()) < lost_at:
            if late_at is not None and now >= late_at:
                late_at = None
                if self._can_hedge(leg):
                    value = self._hedge(leg, search)
                    break
            if self._is_outdated(leg, now):
                break
            value = self._wait(leg, max(0.0, min(late_at or lost_at, lost_at, now + RETRY_INTERVAL_S) - now))
            if value is None and self._hear(leg, search):
                lost_at = leg.heard_at + limit_s
        if value is None:
            silent = limit_s > 0 and leg.flight is not None and self.clock() >= lost_at
            self._give_up(leg, silent=silent)
            if silent and losses is not None:
                losses.hung.add((leg.batch.epoch, leg.shard_id))
        return value

    def _is_outdated(self, leg: Leg, now: float) -> bool:
        """Whether there is a newer plan, by which the shard may be another process by now: not while it works."""
        if now - leg.sent_at < RETRY_INTERVAL_S:
            return False
        plan = self._current_plan()
        if plan.epoch <= leg.batch.epoch:
            return False
        return leg.shard_id in plan.down or leg.shard_id >= plan.num_shards or now - leg.heard_at >= SIGN_S

    def _hear(self, leg: Leg, search: Search) -> bool:
        """Whether the leg's shard has shown since the last look that it works; then nothing counts as lost."""
        if leg.flight is None or not leg.flight.works():
            return False
        now, before = self.clock(), leg.heard_at
        if before - leg.sent_at < self.shard_timeout_s <= now - leg.sent_at:
            log.warning("shard %d works on layer %d for %g s", leg.shard_id, leg.batch.layer_id, self.shard_timeout_s)
        leg.heard_at = now
        search.until = max(search.until, now + self.recovery_timeout_s)
        return True

    def _wait(self, leg: Leg, timeout_s: float) -> Tensor | None:
        """One leg's rows [R, H] float32; None when they are not there, and then without a flight if they never come."""
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
        self._suspects.pop(leg.shard_id, None)
        self._lost_since.pop(leg.shard_id, None)
        size = leg.batch.hidden_states.shape[0].bit_length()
        # From when it was waited for: an answer that lay there while another was late says nothing.
        self._waits.setdefault(size, _Waits()).add(now - began)
        return value.float()

    def _give_up(self, leg: Leg, *, silent: bool = False) -> None:
        """Its rows go elsewhere, and for a while so do others that can. A call by an older plan says nothing of its
        shard, which may be another one by now."""
        if leg.flight is not None:
            leg.flight.abandon()
            leg.flight = None
        if self._current_plan().epoch > leg.batch.epoch:
            return
        self._lost_since.setdefault(leg.shard_id, leg.heard_at)
        suspect = self._suspects.setdefault(leg.shard_id, _Suspect())
        suspect.until = self.clock() + SUSPECT_S[min(suspect.failures, len(SUSPECT_S) - 1)]
        suspect.failures += 1
        suspect.timeouts += silent

    def _patience_s(self, leg: Leg) -> float:
        """How long this leg's answer may take before it is asked of another copy: from what answers took lately."""
        size = leg.batch.hidden_states.shape[0].bit_length()
        waits = self._waits.get(size)
        expected = HEDGE_UNKNOWN_S if waits is None else waits.limit_s
        return min(HEDGE_CEILING_S, max(HEDGE_FLOOR_S, expected))

    def _limit_s(self, leg: Leg, losses: Losses | None) -> float:
        """How long this leg's answer may take before it counts as lost."""
        if losses is not None and (leg.batch.epoch, leg.shard_id) in losses.hung:
            return 0.0
        suspect = self._suspects.get(leg.shard_id)
        if losses is None or suspect is None or not suspect.timeouts:
            return self.shard_timeout_s
        return min(self.shard_timeout_s, HUNG_S * 2.0 ** min(suspect.timeouts - 1, 10))

    def _can_hedge(self, leg: Leg) -> bool:
        """Whether all of its experts have a copy on another shard that is up, and hedges are not used up."""
        plan = self._current_plan()
        if plan.num_shards == 1 or self._hedges < 1.0:
            return False
        late = frozenset({leg.shard_id})
        return bool(self._reaches(plan, leg.batch, late, plan.down | late).all())

    def _hedge(self, late: Leg, search: Search) -> Tensor | None:
        """Asks other copies too, and takes what is whole first: [R, H] float32; None when neither comes."""
        self._hedges -= 1.0
        self.metrics.hedged(late.shard_id)
        log.info("shard %d is late at layer %d; asking its other copies", late.shard_id, late.batch.layer_id)
        kept = late.batch
        others = self._send(
            kept.layer_id, kept.hidden_states, kept.topk_ids, kept.topk_weights, frozenset({late.shard_id})
        )
        values: dict[int, Tensor] = {}
        until = min(search.until, self.clock() + self.shard_timeout_s)
        while self.clock() < until and (late.flight or all(o.flight or i in values for i, o in enumerate(others))):
            for i, other in enumerate(others):
                if i not in values and (value := self._wait(other, TURN_S)) is not None:
                    values[i] = value.clone()  # the carrier may use its memory again
                    other.flight = None
            if len(values) == len(others):
                out = torch.zeros(kept.hidden_states.shape, dtype=torch.float32, device=kept.hidden_states.device)
                for i, other in enumerate(others):
                    _add(out, other.rows, values[i])
                self._give_up(late)
                return out
            value = self._wait(late, TURN_S if not any(other.flight for other in others) else 0.0)
            if value is not None:
                break
            heard = [self._hear(leg, search) for leg in (late, *others)]
            if any(heard):
                until = self.clock() + self.shard_timeout_s
        else:
            value = None
        for other in others:
            if other.flight is not None:
                other.flight.abandon()
        return value

    def _recover(self, lost: Leg, search: Search, losses: Losses | None) -> Tensor:
        """Sends a lost leg's rows again, to other copies or as soon as the plan has news, until all are back.

        Returns [R, H] float32. Raises ShardUnavailable; with `losses` rows may be lost instead.
        """
        batch = lost.batch
        log.warning("shard %d is lost to layer %d; sending its rows again", lost.shard_id, batch.layer_id)
        out = torch.zeros(batch.hidden_states.shape, dtype=torch.float32, device=batch.hidden_states.device)
        open_legs = [(torch.arange(out.shape[0], device=out.device), lost)]
        while open_legs:
            rows, leg = open_legs.pop(0)
            kept = leg.batch
            # An only shard gets all rows, also those of which nothing is wanted any more.
            alone = ~self._has_copy(leg) | (kept.topk_ids == NOT_HERE).all(dim=1)  # [R]
            if alone.any():
                until = search.until
                if losses is not None:
                    until = min(until, self._lost_since.get(leg.shard_id, self.clock()) + LOST_S)
                remaining = until - self.clock()
                if remaining > 0:
                    self.plans.wait_beyond(kept.epoch, min(RETRY_INTERVAL_S, remaining))
                else:
                    error = ShardUnavailable(
                        f"shard {leg.shard_id} did not answer for layer {kept.layer_id} in "
                        f"{self.recovery_timeout_s:g} s (plan epoch {kept.epoch}) and its experts have no other copy: "
                        "try again later",
                        leg.shard_id,
                    )
                    if losses is None:
                        raise error
                    gone = rows[alone]
                    losses.lose(gone if lost.rows is None else lost.rows[gone], error)
                    rows, kept = rows[~alone], kept.of_rows(~alone)
                    if not rows.numel():
                        continue
            self.metrics.rerouted(leg.shard_id, rows.numel())
            for again in self._send(kept.layer_id, kept.hidden_states, kept.topk_ids, kept.topk_weights):
                value = self._receive(again, search, losses)
                own = rows if again.rows is None else rows[again.rows]
                if value is None:
                    open_legs.append((own, again))
                else:
                    out.index_add_(0, own, value)
        return out

    def _has_copy(self, leg: Leg) -> Tensor:
        """Which of the leg's rows, sent now, would go only to shards of which nothing bad is known: [R] bool."""
        plan = self._current_plan()
        bad = plan.down | self._suspected()
        if plan.epoch == leg.batch.epoch:
            bad |= {leg.shard_id}
        return self._reaches(plan, leg.batch, frozenset(), bad)

    def _reaches(self, plan: PlacementPlan, batch: ExpertBatch, avoid: frozenset[int], bad: frozenset[int]) -> Tensor:
        """Which rows, sent now, would go to no bad shard: [R] bool."""
        shards = self._route(plan, batch.layer_id, avoid, batch.topk_ids.device).shards(batch.topk_ids)
        return ~torch.isin(shards, torch.tensor(sorted(bad), device=shards.device)).any(dim=1)

    def _suspected(self) -> frozenset[int]:
        if not self._suspects:
            return frozenset()
        now = self.clock()
        return frozenset(shard_id for shard_id, suspect in self._suspects.items() if suspect.until > now)

    def _route(self, plan: PlacementPlan, layer_id: int, avoid: frozenset[int], device: torch.device) -> Route:
        key = (layer_id, avoid, self._suspected())
        route = self._routes.get(key)
        if route is None:
            route = self._routes[key] = Route(plan, *key, device)
        return route

    def _current_plan(self) -> PlacementPlan:
        plan = self.plans.current()
        if plan.epoch != self._epoch:
            self._epoch = plan.epoch
            self._routes = {}
            self._suspects = {}
            self._lost_since = {s: since for s, since in self._lost_since.items() if s in plan.down}
        return plan


def _add(out: Tensor, rows: Tensor | None, value: Tensor) -> None:
    """out: [T, H].  rows: [R], None for all.  value: [R, H]."""
    if rows is None:
        out.add_(value)
    else:
        out.index_add_(0, rows, value)
