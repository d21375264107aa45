"""Changes of a running cluster that somebody asks for by a call, and the seam behind which they are made."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from cluster.errors import ClusterError, Overloaded

log = logging.getLogger(__name__)

MAX_CHANGES = 8  # at a time: the controller makes them one after another


class Operations(Protocol):
    """Each method returns the outcome as a sentence. Raises InvalidRequest, Unavailable."""

    async def kill_shard(self, shard_id: int) -> str: ...

    async def rebalance(self) -> str: ...

    async def scale_experts(self, num_shards: int) -> str: ...

    async def scale_attention(self, num_replicas: int) -> str: ...

    async def load_adapter(self, name: str, directory: str, *, in_place: bool) -> str:
        """in_place: instead of another adapter of that name."""

    async def unload_adapter(self, name: str) -> str:
        """Raises NotFound too."""

    async def note(self, what: str) -> None:
        """Shows a failure to all who watch the cluster. Raises nothing."""


class ChangeRunner:
    """Makes changes that go on when their callers have left. For one event loop.

    patience_s: of a caller.  note: learns of a failure that its caller does not.
    """

    def __init__(self, patience_s: float, note: Callable[[str], Coroutine[Any, Any, None]]) -> None:
        self._patience_s, self._note = patience_s, note
        self._running: set[asyncio.Task[str]] = set()
        self._notes: set[asyncio.Task[None]] = set()

    async def run(self, what: str, caller: str, change: Coroutine[Any, Any, str]) -> str | None:
        """Returns the outcome as a sentence; None when the change still goes on. Raises as it does, and Overloaded.

        what: the change, for the log.
        """
        if len(self._running) >= MAX_CHANGES:
            change.close()
            raise Overloaded.later(f"{MAX_CHANGES} changes are under way, as many as may", self._patience_s)
        log.warning("%s asks for a change: %s", caller, what)
        task = asyncio.create_task(change)
        self._running.add(task)
        task.add_done_callback(lambda done: self._ended(what, done))
        done, _ = await asyncio.wait((task,), timeout=self._patience_s)
        if done:
            return task.result()
        task.add_done_callback(lambda done: self._ended_alone(what, done))
        return None

    def _ended(self, what: str, task: asyncio.Task[str]) -> None:
        self._running.discard(task)
        if task.cancelled():
            log.warning("%s: cancelled", what)
        elif (error := task.exception()) is None:
            log.info("%s: %s", what, task.result())
        elif isinstance(error, ClusterError):
            log.warning("%s failed: %s", what, error)
        else:
            log.error("%s failed", what, exc_info=error)

    def _ended_alone(self, what: str, task: asyncio.Task[str]) -> None:
        if task.cancelled() or (error := task.exception()) is None:
            return
        reason = str(error) if isinstance(error, ClusterError) else "see the log of the ingress"
        note = asyncio.create_task(self._note(f"{what} failed: {reason}"))
        self._notes.add(note)
        note.add_done_callback(self._notes.discard)
