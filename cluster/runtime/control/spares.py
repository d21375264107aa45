"""Processes that wait for a shard to die: started, torch imported, nothing loaded. One for each node with shards.

A process takes 2 s to start on two idle cores, which rows without another copy would wait. Where shards have GPUs
there is none: Ray gives a process its GPU at its start only.
"""

import asyncio
import logging
import uuid
from collections.abc import Iterable
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.config import ClusterConfig
from cluster.evolving import sent
from cluster.runtime.names import NAMESPACE, spare_prefix
from cluster.runtime.process import actor_environment, num_threads
from cluster.runtime.workers.shard_actor import SHARD_GROUPS, ExpertShardActor

log = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 2.0
NO_SHARD = -1  # what a spare process answers when it is asked which shard it is


class Spare(NamedTuple):
    """name: the actor's."""

    name: str
    actor: Any


class SpareProcesses:
    """Each one's actor has a name, which it keeps as the shard that it becomes."""

    def __init__(self, group: str, config: ClusterConfig) -> None:
        self._group = group
        self.config = config
        self._by_node: dict[str, asyncio.Task[Spare | None]] = {}

    async def keep(self, node_ids: Iterable[str]) -> None:
        """Begins to start one on each node that has none; replaces those that died."""
        if not self.config.spare_processes or self.config.gpus_per_expert_shard:
            return
        for node_id in set(node_ids) - {""}:
            there = self._by_node.get(node_id)
            if there is not None and (not there.done() or await _answers(there.result(), ANSWER_TIMEOUT_S)):
                continue
            if self._by_node.get(node_id) is there:  # not taken meanwhile
                self._by_node[node_id] = asyncio.create_task(self._start(node_id))

    async def started(self, node_id: str) -> None:
        """Waits for the one that begins to start there, if any."""
        if starting := self._by_node.get(node_id):
            await starting

    async def clear(self) -> None:
        """Ends all."""
        for starting in list(self._by_node.values()):
            if spare := await starting:
                ray.kill(spare.actor)
        self._by_node.clear()

    async def take(self, node_id: str, shard_id: int) -> Spare | None:
        """A process on that node, waited for if it is starting, that is the given shard from now on."""
        starting = self._by_node.pop(node_id, None)
        spare = None if starting is None else await starting
        return spare if await _answers(spare, ANSWER_TIMEOUT_S, become=shard_id) else None

    async def _start(self, node_id: str) -> Spare | None:
        name = f"{spare_prefix(self._group)}{uuid.uuid4().hex[:8]}"
        spare = Spare(name, self._create(name, node_id))
        if not await _answers(spare, START_TIMEOUT_S):
            return None
        log.info("%s waits on node %s", name, node_id)
        return spare

    def _create(self, name: str, node_id: str) -> Any:
        threads = num_threads(self.config.cpus_per_expert_shard)
        return (
            ray.remote(concurrency_groups=SHARD_GROUPS)(sent(ExpertShardActor))
            .options(
                name=name,
                namespace=NAMESPACE,
                lifetime="detached",
                max_restarts=0,
                num_cpus=0,  # the CPUs of the shard that it will be are reserved
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
                runtime_env=actor_environment(self._group, threads),
            )
            .remote(NO_SHARD, threads)
        )


async def _answers(spare: Spare | None, timeout_s: float, *, become: int = NO_SHARD) -> bool:
    """Whether there is one that lives; one that does not answer in time is killed."""
    if spare is None:
        return False
    try:
        async with asyncio.timeout(timeout_s):
            await spare.actor.become.remote(become)
    except ray.exceptions.RayError:
        return False
    except TimeoutError:
        ray.kill(spare.actor)
        return False
    return True
