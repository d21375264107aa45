"""Starts, finds and ends a group's processes. The controller's parts know `Launcher`; tests give them another one."""

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cluster.config import ClusterConfig
from cluster.runtime.gcs import GcsThread
from cluster.runtime.names import NAMESPACE, shard_prefix, spare_prefix
from cluster.runtime.process import actor_environment, num_threads, share_of
from cluster.runtime.ray_private.core import by_name, draining_nodes
from cluster.runtime.workers.protocol import NO_SHARD
from cluster.runtime.workers.shard_actor import SHARD_GROUPS, ExpertShardActor
from cluster.status import ProcessInfo

P = ParamSpec("P")
T = TypeVar("T")
log = logging.getLogger(__name__)

RESOURCES_WARNING_S = 30.0  # between two log lines that a shard waits for resources


class Node(NamedTuple):
    """One that lives. resources: in all, also those in use."""

    node_id: str
    resources: Mapping[str, float]


class Place(NamedTuple):
    """Where a shard's process goes: room that stays reserved while processes there die and come again."""

    node_id: str
    group: Any


class Launcher(Protocol):
    """An actor is a handle: `await actor.method.remote(...)`, which raises RayActorError when its process is dead."""

    def me(self) -> Any:
        """The actor that calls this."""

    def restarted(self) -> bool:
        """Whether that actor has been there before, in another process."""

    async def in_thread(self, method: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """Calls a method of these that is no coroutine: all of them wait while Ray's GCS is away, and the event loop
        would wait with them."""

    def nodes(self) -> list[Node]: ...

    def draining(self) -> dict[str, float]:
        """As `draining_nodes`."""

    def find(self, name: str) -> Any | None:
        """The actor of that name, None for none."""

    def named(self) -> list[tuple[str, Any]]:
        """The running processes of this group's shards and its spare processes, with their actors' names."""

    def places(self) -> dict[str, str]:
        """The nodes of this group's reserved places, by the places' names; "" for one that waits for room."""

    async def reserve(self, name: str, node_id: str | None, config: ClusterConfig) -> Place:
        """The place of that name, on that node if it has room; waits until there is room somewhere."""

    def start_shard(self, name: str, shard_id: int, place: Place, config: ClusterConfig) -> Any: ...

    def start_spare(self, name: str, node_id: str, config: ClusterConfig) -> Any: ...

    def end(self, actor: Any) -> None:
        """Without a farewell. An actor that is dead is no error."""

    def restart(self, actor: Any) -> None:
        """Ends it for Ray to start it again, in another process. Blocks."""

    async def kill(self, process: ProcessInfo) -> None:
        """SIGKILL for a process that takes no words from Ray, as one that is stopped. Raises RayError."""

    def give_back(self, place_name: str) -> None:
        """The reserved room, if there is any."""


class RayLauncher:
    """On the connected Ray."""

    def __init__(self, group: str) -> None:
        self._group, self._gcs = group, GcsThread()

    async def in_thread(self, method: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        return await self._gcs.ask(method, *arguments, **options)

    def me(self) -> Any:
        return ray.get_runtime_context().current_actor

    def restarted(self) -> bool:
        return bool(ray.get_runtime_context().was_current_actor_reconstructed)

    def nodes(self) -> list[Node]:
        return [Node(node["NodeID"], node["Resources"]) for node in ray.nodes() if node["Alive"]]

    def draining(self) -> dict[str, float]:
        return draining_nodes()

    def find(self, name: str) -> Any | None:
        try:
            return ray.get_actor(name, namespace=NAMESPACE)
        except ValueError:
            return None

    def named(self) -> list[tuple[str, Any]]:
        prefixes = shard_prefix(self._group), spare_prefix(self._group)
        names = sorted(actor["name"] or "" for actor in ray.util.list_named_actors(all_namespaces=True))
        found = ((name, self.find(name)) for name in names if name.startswith(prefixes))
        return [(name, actor) for name, actor in found if actor is not None]  # others died since

    def places(self) -> dict[str, str]:
        entries = (entry for entry in placement_group_table().values() if entry["state"] != "REMOVED")
        return {
            entry["name"]: next(iter(entry["bundles_to_node_id"].values()), "")
            for entry in entries
            if entry["name"].startswith(shard_prefix(self._group))
        }

    async def reserve(self, name: str, node_id: str | None, config: ClusterConfig) -> Place:
        group: Any = await self.in_thread(_find_placement_group, name)
        if group is None:
            group = await self.in_thread(
                placement_group, [shard_resources(config)], strategy="STRICT_PACK", name=name, lifetime="detached",
                _soft_target_node_id=node_id,
            )  # fmt: skip
        ready = asyncio.ensure_future(_as_future(group.ready()))
        while not (await asyncio.wait([ready], timeout=RESOURCES_WARNING_S))[0]:
            log.warning("%s waits for %s", name, group.bundle_specs)
        [found] = (await self.in_thread(placement_group_table, group))["bundles_to_node_id"].values()
        return Place(found, group)

    def start_shard(self, name: str, shard_id: int, place: Place, config: ClusterConfig) -> Any:
        options = {
            "num_cpus": config.cpus_per_expert_shard,
            "num_gpus": config.gpus_per_expert_shard or 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(place.group, placement_group_bundle_index=0),
        }
        return self._start(name, shard_id, config, options)

    def start_spare(self, name: str, node_id: str, config: ClusterConfig) -> Any:
        options = {
            "num_cpus": 0,  # the CPUs of the shard that it will be are reserved
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False),
        }
        return self._start(name, NO_SHARD, config, options)

    def _start(self, name: str, shard_id: int, config: ClusterConfig, options: Mapping[str, Any]) -> Any:
        threads = num_threads(config.cpus_per_expert_shard)
        actor = ray.remote(concurrency_groups=SHARD_GROUPS)(by_name(ExpertShardActor)).options(
            name=name,
            namespace=NAMESPACE,
            lifetime="detached",
            max_restarts=0,
            runtime_env=actor_environment(self._group, threads),
            **options,
        )
        return actor.remote(shard_id, threads)

    def end(self, actor: Any) -> None:
        ray.kill(actor)

    def restart(self, actor: Any) -> None:
        ray.kill(actor, no_restart=False)

    async def kill(self, process: ProcessInfo) -> None:
        where = NodeAffinitySchedulingStrategy(process.node_id, soft=False)
        task = ray.remote(num_cpus=0)(_kill_process).options(scheduling_strategy=where)
        await task.remote(process.pid)

    def give_back(self, place_name: str) -> None:
        group = _find_placement_group(place_name)
        if group is not None:
            remove_placement_group(group)


def shard_resources(config: ClusterConfig) -> dict[str, float]:
    """Of a node, for one shard."""
    gpus = {"GPU": config.gpus_per_expert_shard} if config.gpus_per_expert_shard else {}
    return {"CPU": config.cpus_per_expert_shard, **gpus, **share_of(config.expert_resource)}


def _kill_process(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


async def _as_future(ref: Any) -> Any:
    return await ref


def _find_placement_group(name: str) -> PlacementGroup | None:
    for group_id, entry in placement_group_table().items():
        if entry["name"] == name and entry["state"] != "REMOVED":
            return PlacementGroup(ray.PlacementGroupID.from_hex(group_id))
    return None
