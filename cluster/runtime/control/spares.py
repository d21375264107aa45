"""Processes that wait for a shard to die: started, torch imported, nothing loaded. One for each node with shards.

A process takes 2 s to start on two idle cores, which rows without another copy would wait. Where shards have GPUs
there is none: Ray gives a process its GPU at its start only.
"""

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Collection, Iterable
from typing import Any, NamedTuple

import ray

from cluster.runtime.control.launcher import Launcher
from cluster.runtime.control.shards import Configured
from cluster.runtime.names import spare_prefix

log = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 2.0


class Spare(NamedTuple):
    """name: the actor's."""

    name: str
    actor: Any


class SpareProcesses:
    """Each one's actor has a name, which it keeps as the shard that it becomes."""

    def __init__(self, group: str, configured: Configured, launcher: Launcher) -> None:
        self._group, self._configured, self._launcher = group, configured, launcher
        self._by_node: dict[str, asyncio.Task[Spare | None]] = {}

    async def keep(self, node_ids: Iterable[str]) -> None:
        """Begins to start one on each node that has none; replaces those that died."""
        config = self._configured.config
        if not config.spare_processes or config.gpus_per_expert_shard:
            return
        for node_id in set(node_ids) - {"", *self._configured.draining}:
            known = self._by_node.get(node_id)
            if known is not None and (not known.done() or await self._lives(known.result(), ANSWER_TIMEOUT_S)):
                continue
            if self._by_node.get(node_id) is known:  # not taken meanwhile
                self._by_node[node_id] = asyncio.create_task(self._start(node_id))

    def leave(self, node_ids: Collection[str]) -> None:
        """Ends those on these nodes, but one that still starts."""
        for node_id in [node_id for node_id, task in self._by_node.items() if node_id in node_ids and task.done()]:
            if spare := self._by_node.pop(node_id).result():
                self._launcher.end(spare.actor)

    async def started(self, node_id: str) -> None:
        """Waits for the one that begins to start on that node, if any."""
        if starting := self._by_node.get(node_id):
            await starting

    async def clear(self) -> None:
        """Ends all."""
        for starting in list(self._by_node.values()):
            if spare := await starting:
                self._launcher.end(spare.actor)
        self._by_node.clear()

    async def take(self, node_id: str, shard_id: int) -> Spare | None:
        """A process on that node, waited for if it is starting, that is the given shard from now on; None without a
        living one."""
        starting = self._by_node.pop(node_id, None)
        spare = None if starting is None else await starting
        if spare is None or not await self._lives(spare, ANSWER_TIMEOUT_S):
            return None
        return spare if await self._answers(spare, spare.actor.become.remote(shard_id), ANSWER_TIMEOUT_S) else None

    async def _start(self, node_id: str) -> Spare | None:
        name = f"{spare_prefix(self._group)}{uuid.uuid4().hex[:8]}"
        config, launcher = self._configured.config, self._launcher
        spare = Spare(name, await launcher.in_thread(launcher.start_spare, name, node_id, config))
        if not await self._lives(spare, START_TIMEOUT_S):
            return None
        log.info("%s waits on node %s", name, node_id)
        return spare

    async def _lives(self, spare: Spare | None, timeout_s: float) -> bool:
        """Asks it for its shard, which changes nothing."""
        return spare is not None and await self._answers(spare, spare.actor.which.remote(), timeout_s)

    async def _answers(self, spare: Spare, answer: Awaitable[object], timeout_s: float) -> bool:
        """False for one that died; one that does not answer in time is killed."""
        try:
            async with asyncio.timeout(timeout_s):
                await answer
        except ray.exceptions.RayError:
            return False
        except TimeoutError:
            self._launcher.end(spare.actor)
            return False
        return True
