"""What the controller knows of its cluster, and who waits for news of it. Decides nothing."""

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray

from cluster.checkpoint.info import resolve_dtype
from cluster.checkpoint.reader import CheckpointReader
from cluster.config import ClusterConfig
from cluster.engine.load import torch_dtype
from cluster.errors import SetupError
from cluster.experts.load_meter import LoadMeter
from cluster.experts.placement import PlacementPlan, num_shards_for
from cluster.metrics import ControllerMetrics
from cluster.runtime.control.shard_process import ShardProcess
from cluster.runtime.workers.protocol import ClusterRecord
from cluster.status import Fault, ReplicaStatus

log = logging.getLogger(__name__)

LOAD_HALF_LIFE_S = 60.0  # of the loads that placement follows: longer than a burst, shorter than a change of traffic
MAX_FAULTS = 50  # that `status` remembers


class ClusterState:
    """Shared by the controller's parts, on its event loop.

    target: how many shards there shall be.  published: the plan has been given to someone.  failure: why there can be
    no shards.  work: the change of placement under way.  news: notified of a new plan, of a replica that has it, of a
    failure.  look: a shard came up.
    """

    def __init__(self, group: str, config: ClusterConfig, metrics: ControllerMetrics) -> None:
        self.group = group
        self.config = config
        self.metrics = metrics
        self.target = config.expert_shards
        self.shards: dict[int, ShardProcess] = {}
        self.replicas: dict[str, ReplicaStatus] = {}
        self.faults: deque[Fault] = deque(maxlen=MAX_FAULTS)
        self.plan: PlacementPlan | None = None
        self.published = False
        self.failure: SetupError | None = None
        self.work = ""
        self.uncovered_since: float | None = None
        self.news = asyncio.Condition()
        self.look = asyncio.Event()
        self.expert_bytes = 0
        self.num_experts = 0
        self.sparse_layers: tuple[int, ...] = ()
        self.load: LoadMeter | None = None

    def read_checkpoint(self) -> None:
        """What placement must know of the model. Raises SetupError."""
        reader = CheckpointReader(self.config.model)
        reader.check_names()
        dtype = torch_dtype(resolve_dtype(self.config.dtype, reader.config))
        self.expert_bytes = reader.config.expert_bytes(str(dtype).removeprefix("torch."))
        self.num_experts = reader.config.num_experts
        self.sparse_layers = tuple(reader.config.sparse_layers)
        self.target = self.shards_of(self.config)
        self.load = LoadMeter(len(self.sparse_layers), self.num_experts, half_life_s=LOAD_HALF_LIFE_S)

    def shards_of(self, config: ClusterConfig) -> int:
        """The shards that a configuration asks for."""
        return num_shards_for(self.num_experts, config.expert_shards)

    def rates(self) -> Any:
        """[sparse layers, experts] tokens/s, None before the checkpoint is read."""
        return None if self.load is None else self.load.rates(time.monotonic())

    def handles(self) -> dict[int, Any]:
        """The actors of the shards that are up."""
        return {shard_id: s.handle for shard_id, s in self.shards.items() if s.handle is not None}

    def all_up(self) -> bool:
        return all(shard.handle is not None for shard in self.shards.values())

    def slice_of(self, shard_id: int) -> dict[int, tuple[int, ...]]:
        """What the plan gives a shard."""
        assert self.plan is not None
        return dict(self.plan.slices[shard_id]) if shard_id < self.plan.num_shards else {}

    def is_news(self, known_epoch: int) -> bool:
        return self.published and self.plan is not None and self.plan.epoch > known_epoch

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for news that make it true. Raises the failure."""
        async with self.news:
            await self.news.wait_for(lambda: condition() or self.failure is not None)
        if self.failure is not None:
            raise self.failure

    def publish(self, plan: PlacementPlan, *, beyond: int = 0) -> None:
        """Makes it the plan, under a higher epoch, and wakes who waits for one. Call with `news` held."""
        up = self.handles().keys()
        epoch = max(plan.epoch, beyond, self.plan.epoch if self.plan else 0) + 1
        self.plan = replace(plan, epoch=epoch, down=frozenset(range(plan.num_shards)) - up)
        self.published = True
        self.metrics.plan_epoch(self.plan.epoch)
        self.metrics.shards(len(up), self.target)
        copies = Counter(
            min(2, sum(shard_id in up for shard_id in owners))
            for layer_id in self.plan.layer_ids
            for owners in self.plan.owners(layer_id)
        )
        self.metrics.coverage(copies[0], copies[1], copies[2])
        if not copies[0]:
            self.uncovered_since = None
        elif self.uncovered_since is None:
            self.uncovered_since = time.monotonic()
        self.remember()
        self.news.notify_all()
        log.info("%s: plan epoch %d, %d of %d shards up", self.group, self.plan.epoch, len(up), len(self.shards))

    def remember(self) -> None:
        """Leaves with the shards what a successor must know."""
        if self.plan is None:
            return
        record = ClusterRecord(
            version=time.time(), plan=replace(self.plan, down=frozenset()), target=self.target, config=self.config
        )
        for shard in self.shards.values():
            if shard.handle is not None:
                shard.handle.remember.remote(record)

    def note(self, what: str) -> None:
        """Remembers a fault for `status`."""
        self.faults.append(Fault(at=time.time(), what=what))

    async def fail(self, error: SetupError) -> None:
        """There can be no shards: tells who waits for them."""
        log.error("%s: %s", self.group, error)
        async with self.news:
            self.failure = error
            self.news.notify_all()


def this_actor() -> Any:
    """For whom it calls, to answer to."""
    return ray.get_runtime_context().current_actor
