"""Chooses the copies of experts that rows may go to, by the current plan and by the calls to its shards so far.

R: rows for one shard.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cluster.experts.placement import PlacementPlan
from cluster.experts.route import Route
from cluster.experts.transport import ExpertBatch

SUSPECT_S = (1.0, 2.0, 4.0, 8.0, 16.0)  # for so long a shard that failed 1, 2, … calls gets no rows with another copy


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
class _Suspect:
    """A shard that failed calls in a row, `silences` of them by silence. Until `until` it gets no rows that another one
    can compute."""

    failures: int = 0
    silences: int = 0
    until: float = 0.0


class Routing:
    """Makes routes by the current plan, and keeps for as long how calls to its shards went. Used by one thread."""

    def __init__(self, plans: PlanSource, clock: Callable[[], float]) -> None:
        self._plans = plans
        self._clock = clock
        self._epoch = 0
        self._routes: dict[tuple[int, frozenset[int], frozenset[int]], Route] = {}
        self._suspects: dict[int, _Suspect] = {}
        self._lost_since: dict[int, float] = {}

    @property
    def epoch(self) -> int:
        """Of the plan that was read last."""
        return self._epoch

    def plan(self) -> PlacementPlan:
        """The current one."""
        plan = self._plans.current()
        if plan.epoch != self._epoch:
            self._epoch = plan.epoch
            self._routes = {}
            self._suspects = {}
            self._lost_since = {s: since for s, since in self._lost_since.items() if s in plan.down}
        return plan

    def route(self, plan: PlacementPlan, layer_id: int, avoid: frozenset[int]) -> Route:
        """By the plan that `plan` returned last: another thread may have changed the current one since.

        avoid: shards that get only rows that no other can compute.
        """
        key = (layer_id, avoid, self.suspected())
        route = self._routes.get(key)
        if route is None:
            route = self._routes[key] = Route(plan, *key)
        return route

    def can_do_without(self, shard_id: int, batch: ExpertBatch) -> bool:
        """Whether other shards that are up have a copy of each expert of the batch."""
        plan, late = self.plan(), frozenset({shard_id})
        return plan.num_shards > 1 and bool(self._spared(plan, batch, plan.down | late, avoid=late).all())

    def covered(self, shard_id: int, batch: ExpertBatch) -> Tensor:
        """The rows of a batch, whose call to the shard failed, that would now go only to shards of which nothing bad is
        known: [R] bool."""
        plan = self.plan()
        bad = plan.down | self.suspected()
        if plan.epoch == batch.epoch:
            bad |= {shard_id}
        return self._spared(plan, batch, bad)

    def suspected(self) -> frozenset[int]:
        if not self._suspects:
            return frozenset()
        now = self._clock()
        return frozenset(shard_id for shard_id, suspect in self._suspects.items() if suspect.until > now)

    @property
    def is_calm(self) -> bool:
        """Whether the last call to each shard went well."""
        return not (self._suspects or self._lost_since)

    def num_silences(self, shard_id: int) -> int:
        """Calls in a row that the shard has failed by silence."""
        suspect = self._suspects.get(shard_id)
        return suspect.silences if suspect is not None else 0

    def lost_since(self, shard_id: int) -> float | None:
        """When a shard that fails its calls last showed that it works."""
        return self._lost_since.get(shard_id)

    def answered(self, shard_id: int) -> None:
        self._suspects.pop(shard_id, None)
        self._lost_since.pop(shard_id, None)

    def failed(self, shard_id: int, *, heard_at: float, silent: bool) -> None:
        """A call by the current plan failed, by silence or otherwise. heard_at: when the shard last showed that it
        works."""
        self._lost_since.setdefault(shard_id, heard_at)
        suspect = self._suspects.setdefault(shard_id, _Suspect())
        suspect.until = self._clock() + SUSPECT_S[min(suspect.failures, len(SUSPECT_S) - 1)]
        suspect.failures += 1
        suspect.silences += silent

    def _spared(
        self, plan: PlacementPlan, batch: ExpertBatch, bad: frozenset[int], avoid: frozenset[int] = frozenset()
    ) -> Tensor:
        """The rows that would now go to no bad shard: [R] bool."""
        shards = self.route(plan, batch.layer_id, avoid).shards(batch.topk_ids.cpu().numpy())
        spared = ~np.isin(shards, sorted(bad)).any(axis=1)
        return torch.from_numpy(spared).to(batch.topk_ids.device)
