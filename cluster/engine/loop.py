"""Runs an engine in a separate thread: commands go in, one message a step comes out. Knows no Ray."""

import logging
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.engine.adapters import Adapters
from cluster.engine.engine import Engine
from cluster.engine.isolation import failure_of
from cluster.errors import ClusterError
from cluster.types import EngineRequest, EngineStats, SequenceUpdate

if TYPE_CHECKING:  # OpenTelemetry, where traces are asked for
    from cluster.tracing.engine import EngineTracing

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Abort:
    """Of a client's requests by their names."""

    client: str
    names: frozenset[str]


class EngineLoop:
    """All but `start` and `stop` may be called from any thread; the engine is touched by the loop's alone."""

    def __init__(self, engine: Engine, tracing: "EngineTracing | None" = None) -> None:
        self._engine = engine
        self._tracing = tracing
        self._inbox: queue.SimpleQueue[EngineRequest | str | Abort | None] = queue.SimpleQueue()
        self._news = threading.Condition()
        self._updates: list[SequenceUpdate] = []
        self._message: list[SequenceUpdate] = []
        self._number = 0
        self._failure: BaseException | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, requests: Sequence[EngineRequest]) -> None:
        """Queues requests for the next step. A refusal comes back as that request's update."""
        for request in requests:
            self._inbox.put(request)

    def cancel(self, request_ids: Sequence[str]) -> None:
        """Ends sequences before the next step."""
        for request_id in request_ids:
            self._inbox.put(request_id)

    def abort(self, client: str, names: Sequence[str]) -> None:
        """Ends a client's sequences by the names that it gave them, before the next step. Unknown ones are no error."""
        self._inbox.put(Abort(client, frozenset(names)))

    def poll(self, timeout_s: float, received: int) -> tuple[int, list[SequenceUpdate]]:
        """Blocks until there is news; returns a number and the news since the last message.

        received: the number of the last message that the caller has, 0 for none. A message that got lost on its way
        is given again: no token is lost with a call. When the time is over without news the list is empty.
        Raises the exception that ended the engine's thread, if one did.
        """
        with self._news:
            if received == self._number:
                self._news.wait_for(lambda: self._updates or self._stopped, timeout_s)
                if self._failure is not None:
                    raise self._failure
                if not self._updates:
                    return self._number, []
                self._message, self._updates = self._updates, []
                self._number += 1
            return self._number, self._message

    def stats(self) -> EngineStats:
        return self._engine.stats()

    @property
    def adapters(self) -> Adapters:
        """Those of its engine."""
        return self._engine.adapters

    def adapters_in_use(self) -> tuple[int, ...]:
        """The numbers of its sequences' adapters, also of those that are unloaded."""
        sequences = list(self._engine.sequences.values())
        return tuple({s.adapter.source.number for s in sequences if s.adapter is not None})

    def flush_traces(self) -> None:
        """Sends the spans that are left, as `Spans.flush`."""
        if self._tracing is not None:
            self._tracing.flush()

    def stop(self) -> None:
        """Ends the thread after the step under way. Blocks."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._take_commands(block=not self._engine.has_work):
                updates = self._engine.step()
                if updates:
                    if self._tracing is not None:
                        self._tracing.told(updates)
                    with self._news:
                        self._updates += updates
                        self._news.notify_all()
        except BaseException as error:
            log.exception("the engine ended")
            if self._tracing is not None:
                self._tracing.broke(error)
            self._failure = error
        with self._news:
            self._stopped = True
            self._news.notify_all()

    def _take_commands(self, *, block: bool) -> bool:
        """Carries out the commands that have arrived; returns False when the loop shall end."""
        try:
            command = self._inbox.get(block=block)
            while True:
                if command is None:
                    return False
                self._carry_out(command)
                command = self._inbox.get_nowait()
        except queue.Empty:
            return True

    def _carry_out(self, command: EngineRequest | str | Abort) -> None:
        if isinstance(command, Abort):
            for request_id, sequence in list(self._engine.sequences.items()):
                request = sequence.request
                if request.client == command.client and request.name in command.names:
                    self._engine.cancel(request_id)
            return
        if isinstance(command, str):
            self._engine.cancel(command)
            return
        if self._tracing is not None:
            self._tracing.arrived(command)
        self._engine.on_step((command.request_id,))  # to take it in may end the process, too
        try:
            self._engine.submit(command)
        except Exception as error:  # noqa: BLE001 one request's fault must not end the others
            failure = error if isinstance(error, ClusterError) else failure_of(command.called, error)
            refusal = SequenceUpdate(request_id=command.request_id, finish_reason="error", error=failure)
            if self._tracing is not None:
                self._tracing.told([refusal])
            with self._news:
                self._updates.append(refusal)
                self._news.notify_all()
