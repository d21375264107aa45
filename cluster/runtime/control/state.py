"""A cluster's plan, the number of its shards, its configuration, and the tasks that wait for news of them.

The controller's parts read it; only its own methods change it, but for `adapters`, which `SharedAdapters` sets.
Decides nothing.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Set
from dataclasses import replace
from typing import NamedTuple

from cluster.config import ClusterConfig
from cluster.config.lora import AdapterList
from cluster.errors import SetupError
from cluster.experts.placement import PlacementPlan, num_shards_for
from cluster.metrics import ControllerMetrics
from cluster.runtime.control.news import News
from cluster.runtime.control.shards import Shards
from cluster.runtime.workers.protocol import ClusterRecord
from cluster.status import Fault

log = logging.getLogger(__name__)

MAX_FAULTS = 50  # that `status` remembers


class Coverage(NamedTuple):
    """Experts, over all layers, by their copies that are up."""

    none: int
    one: int
    more: int


def coverage(plan: PlacementPlan, up: Set[int]) -> Coverage:
    """up: the shards that are."""
    copies = Counter(
        min(2, sum(shard_id in up for shard_id in owners))
        for layer_id in plan.layer_ids
        for owners in plan.owners(layer_id)
    )
    return Coverage(copies[0], copies[1], copies[2])


class ClusterState:
    """target: how many shards there shall be.  published: the plan has been given to someone.  failure: why there can
    be no shards.  news: of a new plan, of an engine that has it, of a failure.

    clock: monotonic, in seconds.  wall_clock: since 1970.
    """

    def __init__(
        self,
        group: str,
        config: ClusterConfig,
        shards: Shards,
        metrics: ControllerMetrics,
        *,
        news: News,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.group = group
        self.news = news
        self._shards, self._metrics = shards, metrics
        self._clock, self._wall_clock = clock, wall_clock
        self._config, self._target = config, config.expert_shards
        self._plan: PlacementPlan | None = None
        self._published = False
        self._failure: SetupError | None = None
        self._uncovered_since: float | None = None
        self._faults: deque[Fault] = deque(maxlen=MAX_FAULTS)
        self.adapters = AdapterList()  # that shards hold a part of
        self._draining: Mapping[str, float] = {}

    @property
    def config(self) -> ClusterConfig:
        return self._config

    @property
    def target(self) -> int:
        return self._target

    @property
    def published(self) -> bool:
        return self._published

    @property
    def failure(self) -> SetupError | None:
        return self._failure

    @property
    def draining(self) -> Mapping[str, float]:
        """The nodes that Ray drains, and until when each stays (wall clock)."""
        return self._draining

    @property
    def faults(self) -> tuple[Fault, ...]:
        return tuple(self._faults)

    @property
    def plan(self) -> PlacementPlan:
        """There is one once the controller has begun, unless it failed."""
        assert self._plan is not None
        return self._plan

    @property
    def known_plan(self) -> PlacementPlan | None:
        return self._plan

    @property
    def uncovered_s(self) -> float:
        """For how long some expert has had no copy that is up, 0 if none."""
        return 0.0 if self._uncovered_since is None else self._clock() - self._uncovered_since

    def slice_of(self, shard_id: int) -> dict[int, tuple[int, ...]]:
        """The plan's experts for a shard; empty for one that the plan does not have yet."""
        return dict(self.plan.slices[shard_id]) if shard_id < self.plan.num_shards else {}

    def is_news(self, known_epoch: int) -> bool:
        return self._published and self.plan.epoch > known_epoch

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for news that make it true. Raises the failure."""
        await self.news.wait_for(lambda: condition() or self._failure is not None)
        if self._failure is not None:
            raise self._failure

    def begin(self, plan: PlacementPlan) -> None:
        """The first plan of a new cluster; published once its shards are up, at once where a dense model has none."""
        self._plan, self._target = plan, plan.num_shards
        self._metrics.shards(0, self._target)
        if not plan.num_shards:
            self.publish()

    def resume(self, record: ClusterRecord) -> None:
        """Goes on from what an earlier controller left."""
        self._config = record.config
        self.begin(record.plan)
        self._target = record.target

    def follow(self, config: ClusterConfig) -> None:
        """All parts read it from now on."""
        before, self._config = self._config, config
        if config.expert_shards != before.expert_shards and self._plan is not None:
            self._target = num_shards_for(self._plan.num_experts, config.expert_shards)
        self.aim(self._target)

    def aim(self, num_shards: int) -> None:
        """How many shards there shall be from now on."""
        self._target = num_shards
        self._metrics.shards(len(self._shards.handles()), num_shards)
        self.remember()

    def publish(self, plan: PlacementPlan | None = None, *, beyond: int = 0) -> None:
        """Gives a plan, the last one again by default, to all that wait for one. Its epoch is above all earlier ones
        and `beyond`; it names the shards that are down at the moment."""
        up = self._shards.handles().keys()
        plan = plan or self.plan
        epoch = max(plan.epoch, beyond, self.plan.epoch) + 1
        self._plan = replace(plan, epoch=epoch, down=frozenset(range(plan.num_shards)) - up)
        self._published = True
        self._metrics.plan_epoch(epoch)
        self._metrics.shards(len(up), self._target)
        self._cover(coverage(self._plan, up))
        self.remember()
        self.news.tell()
        log.info("%s: plan epoch %d, %d of %d shards up", self.group, epoch, len(up), len(self._shards))

    def _cover(self, found: Coverage) -> None:
        self._metrics.coverage(*found)
        if not found.none:
            self._uncovered_since = None
        elif self._uncovered_since is None:
            self._uncovered_since = self._clock()

    def remember(self) -> None:
        """Leaves a record with the shards, for a successor."""
        if self._plan is None:
            return
        record = ClusterRecord(
            version=self._wall_clock(),
            plan=replace(self._plan, down=frozenset()),
            target=self._target,
            config=self._config,
        )
        for handle in self._shards.handles().values():
            handle.remember.remote(record)

    def note(self, what: str) -> None:
        """Remembers a fault for `status`."""
        self._faults.append(Fault(at=self._wall_clock(), what=what))

    def note_draining(self, nodes: Mapping[str, float]) -> None:
        """As `draining`."""
        self._draining = nodes

    def fail(self, error: SetupError) -> None:
        """There can be no shards: all that wait for them get the error."""
        log.error("%s: %s", self.group, error)
        self._failure = error
        self.news.tell()
