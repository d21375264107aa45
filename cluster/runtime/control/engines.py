"""The engines, and others, that need the shards: each one's last question for the plan, and the plan that it has."""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Container
from dataclasses import replace
from typing import Any

from cluster.runtime.control.news import News
from cluster.runtime.deaths import until_dead
from cluster.runtime.workers.protocol import REPLICA_SILENCE_S
from cluster.status import ProcessInfo, ReplicaStatus

log = logging.getLogger(__name__)


class Engines:
    """Used by one event loop."""

    def __init__(
        self,
        news: News,
        note: Callable[[str], None],
        *,
        draining: Callable[[], Container[str]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """news: told when an engine has a plan or is gone.  note: called with faults.  draining: nodes, where an
        engine's end is none."""
        self._news, self._note, self._draining, self._clock = news, note, draining, clock
        self._known: dict[str, ReplicaStatus] = {}
        self._watchers: dict[str, asyncio.Task[None]] = {}

    def register(self, holder: str, process: ProcessInfo, engine: Any | None) -> ReplicaStatus:
        """Takes note of one that asks. An engine gets the lowest slot that no living one has, or the one that it says
        it has already; engine: its actor, None for a holder that is none."""
        found = self._known.get(holder)
        if found is None:
            if engine is not None:
                taken = {known.process.slot for known in self._known.values()}
                free = next(slot for slot in itertools.count() if slot not in taken)
                process = replace(process, slot=free if process.slot in {-1, *taken} else process.slot)
            found = self._known[holder] = ReplicaStatus(name=holder, process=process, engine=engine, asked_at=0.0)
            if engine is not None:
                self._watchers[holder] = asyncio.create_task(self._watch(found, engine))
        found.asked_at = self._clock()
        return found

    def has_plan(self, engine: ReplicaStatus, epoch: int) -> None:
        """The engine says which one."""
        engine.epoch = epoch
        self._news.tell()

    def known(self) -> tuple[ReplicaStatus, ...]:
        """Without those that were silent for too long, which are forgotten."""
        limit = self._clock() - REPLICA_SILENCE_S
        self._known = {name: engine for name, engine in self._known.items() if engine.asked_at > limit}
        return tuple(self._known.values())

    def find(self, holder: str) -> ReplicaStatus | None:
        return self._known.get(holder)

    async def adopted(self, epoch: int, timeout_s: float) -> bool:
        """Waits for those that are alive to have the plan; false when some do not in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._news.wait_for(lambda: all(engine.epoch >= epoch for engine in self.known()))
        except TimeoutError:
            return False
        return True

    async def _watch(self, replica: ReplicaStatus, engine: Any) -> None:
        """Forgets an attention replica when its engine dies. Serve replaces it; this is for `status`."""
        died = await until_dead(engine, f"the engine of attention replica {replica.name}")
        if died and replica.process.node_id not in self._draining():
            self._note(f"attention replica {replica.name} lost its engine")
        self._known.pop(replica.name, None)
        self._watchers.pop(replica.name, None)
        self._news.tell()

    def close(self) -> None:
        """Watches no more."""
        for watcher in self._watchers.values():
            watcher.cancel()
