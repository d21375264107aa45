"""One expert shard as the controller handles it: its place in the cluster, and the actor that lives there.

The actor dies and comes again; the place, a placement group of one bundle, stays until the shard is removed.
"""

import asyncio
import logging
import os
import signal
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cluster.config import ClusterConfig
from cluster.evolving import sent
from cluster.experts.pulse import Sign
from cluster.runtime.control.spares import SpareProcesses
from cluster.runtime.names import NAMESPACE, shard_name
from cluster.runtime.process import actor_environment, num_threads, share_of
from cluster.runtime.workers.shard_actor import SHARD_GROUPS, ExpertShardActor
from cluster.status import ShardStatus

log = logging.getLogger(__name__)

Slice = Mapping[int, Sequence[int]]  # layer id -> expert ids

RESOURCES_WARNING_S = 30.0  # between two log lines that a shard waits for resources
HEARTBEAT_S = 2.0  # between two looks at a shard


class ShardProcess:
    """handle: the actor while it is up, with its slice loaded; None else.  leaves: its end is meant."""

    def __init__(self, group: str, shard_id: int, config: ClusterConfig) -> None:
        self.group = group
        self.config = config
        self.status = ShardStatus(shard_id=shard_id, actor=shard_name(group, shard_id))
        self.handle: Any | None = None
        self.leaves = False
        self._actor: Any | None = None
        self._wanted_node = ""

    @property
    def shard_id(self) -> int:
        return self.status.shard_id

    @property
    def node_id(self) -> str:
        """Where it is, or was meant to be while it is not there yet."""
        return self.status.node_id or self._wanted_node

    @property
    def name(self) -> str:
        """Of the placement group, and of the actor unless that was a spare process."""
        return shard_name(self.group, self.shard_id)

    async def start(self, node_id: str | None, spares: SpareProcesses) -> None:
        """Finds the running actor, takes a spare process or makes one; waits for the cluster to have room.

        node_id: where it had best be.
        """
        self._actor = self.find()
        if self._actor is None:
            self._wanted_node, self.status.process = node_id or "", None
            place = await self._reserve(node_id)
            self._actor = await self._spare(place, spares) or self._create(place)
        self.status.state = "loading"

    async def _spare(self, place: PlacementGroup, spares: SpareProcesses) -> Any | None:
        [node_id] = placement_group_table(place)["bundles_to_node_id"].values()
        spare = await spares.take(node_id, self.shard_id)
        if spare is None:
            return None
        self.status.actor = spare.name
        return spare.actor

    async def load(self, experts: Slice, controller: Any) -> None:
        """Makes the actor hold `experts`; nothing is read when it does. Raises RayActorError, RayTaskError."""
        assert self._actor is not None
        wanted = {layer_id: tuple(ids) for layer_id, ids in experts.items()}
        if await self._actor.held.remote() != wanted or not wanted:
            config = self.config
            await self._actor.load.remote(config.model, wanted, config.dtype, config.device, controller)
        self.status.process = await self._actor.process.remote()

    def up(self) -> None:
        self.handle = self._actor
        self.status.state = "up"

    async def lost(self) -> str:
        """Returns when the actor is dead, or answers nothing for shard_timeout_s, or does not get on with its work for
        so long, and is killed; says which. A computation that goes on may take as long as it likes.
        """
        assert self._actor is not None
        actor = self._actor
        asks = actor.sign if hasattr(actor, "sign") else actor.process  # an older version has no `sign`
        death = asyncio.ensure_future(_as_future(self._actor.hold.remote()))
        try:
            while True:
                done, _ = await asyncio.wait([death], timeout=HEARTBEAT_S)
                if done:
                    return "died"
                limit_s = self.config.shard_timeout_s
                try:
                    async with asyncio.timeout(limit_s):
                        sign = await asks.remote()
                except TimeoutError:
                    await self._kill_hung()
                    return f"did not answer for {limit_s:g} s and was killed"
                except ray.exceptions.RayActorError:
                    return "died"
                if isinstance(sign, Sign) and sign.stuck_s >= limit_s:
                    await self._kill_hung()
                    return f"did not get on with its work for {sign.stuck_s:.0f} s and was killed"
        finally:
            death.cancel()

    def down(self) -> None:
        self.handle = self._actor = None
        self.status.actor = self.name
        self.status.state, self.status.loaded_bytes = "lost", 0
        self.status.respawns += not self.leaves
        self.leaves = False

    def find(self) -> Any | None:
        try:
            return ray.get_actor(self.status.actor, namespace=NAMESPACE)
        except ValueError:
            return None

    def remove(self) -> None:
        """Kills the actor and gives its place back."""
        actor = self.find()
        if actor is not None:
            ray.kill(actor)
        place = _find_placement_group(self.name)
        if place is not None:
            remove_placement_group(place)

    async def _reserve(self, node_id: str | None) -> PlacementGroup:
        place = _find_placement_group(self.name)
        if place is None:
            bundle = {"CPU": self.config.cpus_per_expert_shard}
            if self.config.gpus_per_expert_shard:
                bundle["GPU"] = self.config.gpus_per_expert_shard
            bundle |= share_of(self.config.expert_resource)
            place = placement_group(
                [bundle], strategy="STRICT_PACK", name=self.name, lifetime="detached", _soft_target_node_id=node_id
            )
        ready = asyncio.ensure_future(_as_future(place.ready()))
        while not (await asyncio.wait([ready], timeout=RESOURCES_WARNING_S))[0]:
            log.warning("%s waits for %s", self.name, place.bundle_specs)
        return place

    def _create(self, place: PlacementGroup) -> Any:
        threads = num_threads(self.config.cpus_per_expert_shard)
        return (
            ray.remote(concurrency_groups=SHARD_GROUPS)(sent(ExpertShardActor))
            .options(
                name=self.name,
                namespace=NAMESPACE,
                lifetime="detached",
                max_restarts=0,
                num_cpus=self.config.cpus_per_expert_shard,
                num_gpus=self.config.gpus_per_expert_shard or 0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(place, placement_group_bundle_index=0),
                runtime_env=actor_environment(self.group, threads),
            )
            .remote(self.shard_id, threads)
        )

    async def _kill_hung(self) -> None:
        """A stopped process takes no words from Ray: a task on its node sends it SIGKILL."""
        process = self.status.process
        if process is not None:
            where = NodeAffinitySchedulingStrategy(process.node_id, soft=False)
            kill = ray.remote(num_cpus=0)(_kill_process).options(scheduling_strategy=where)
            try:
                async with asyncio.timeout(self.config.shard_timeout_s):
                    await kill.remote(process.pid)
            except (TimeoutError, ray.exceptions.RayError) as error:
                log.warning("%s hangs and could not be killed: %r", self.name, error)
        ray.kill(self._actor)


def _kill_process(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


async def _as_future(ref: Any) -> Any:
    return await ref


def _find_placement_group(name: str) -> PlacementGroup | None:
    for group_id, entry in placement_group_table().items():
        if entry["name"] == name and entry["state"] != "REMOVED":
            return PlacementGroup(ray.PlacementGroupID.from_hex(group_id))
    return None
