"""An engine's process: a Ray actor around `EngineLoop`, which knows no Ray."""

import os
import threading
from collections.abc import Sequence
from typing import Any

import ray

from cluster.config import ClusterConfig
from cluster.config.lora import AdapterList
from cluster.evolving import on_wire
from cluster.runtime.process import end_at_sigterm, prepare_process
from cluster.types import EngineRequest, EngineStats, SequenceUpdate


@on_wire("cluster.runtime.actors")
class EngineActor:
    """An attention replica's engine, in a process with nothing else that is busy.

    The replica submits and cancels through one group of threads and waits for news in another.
    """

    def __init__(
        self, config: ClusterConfig, replica: str, controller: Any, num_threads: int, record_path: str = ""
    ) -> None:
        """record_path: the file where the replica reads, when the engine has died, which requests it computed."""
        prepare_process()
        end_at_sigterm()
        from cluster.runtime.workers.engine_start import start_engine  # torch, which only this process needs

        self.loop = start_engine(config, replica, controller, num_threads, record_path)

    def ready(self) -> int:
        """Returns this process's id once the constructor is through."""
        return os.getpid()

    @ray.method(concurrency_group="watch")
    def hold(self) -> None:
        """Never returns: its caller hears of this process's death at once."""
        threading.Event().wait()

    @ray.method(concurrency_group="control")
    def submit(self, requests: Sequence[EngineRequest]) -> None:
        self.loop.submit(requests)

    @ray.method(concurrency_group="control")
    def cancel(self, request_ids: Sequence[str]) -> None:
        self.loop.cancel(request_ids)

    @ray.method(concurrency_group="control")
    def abort(self, client: str, names: Sequence[str]) -> None:
        """Ends a client's requests by the names that it gave them."""
        self.loop.abort(client, names)

    @ray.method(concurrency_group="adapt")
    def adapt(self, wanted: AdapterList) -> None:
        """As `Adapters.follow`, while steps go on."""
        self.loop.adapters.follow(wanted)

    @ray.method(concurrency_group="adapt")
    def adapted(self) -> AdapterList:
        """The adapters that it has."""
        return self.loop.adapters.current

    @ray.method(concurrency_group="adapt")
    def adapters_in_use(self) -> tuple[int, ...]:
        """The numbers of the adapters of running and waiting requests, also of those that are unloaded."""
        return self.loop.adapters_in_use()

    @ray.method(concurrency_group="control")
    def flush_traces(self) -> None:
        """Before the end of this process: sends the spans that are left. Blocks for a second at most."""
        self.loop.flush_traces()

    @ray.method(concurrency_group="control")
    def stats(self) -> EngineStats:
        return self.loop.stats()

    @ray.method(concurrency_group="poll")
    def poll(self, timeout_s: float, received: int) -> tuple[int, list[SequenceUpdate]]:
        """As `EngineLoop.poll`: one message a step for all sequences, or one for several when asked late."""
        return self.loop.poll(timeout_s, received)


ENGINE_GROUPS = {"control": 1, "poll": 1, "watch": 1, "adapt": 1}
