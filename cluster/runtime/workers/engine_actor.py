"""An engine's process: a Ray actor around `EngineLoop`, which knows no Ray."""

import logging
import os
import threading
from collections.abc import Sequence
from typing import Any

import ray

from cluster.checkpoint.names import dense_bytes, dense_shapes
from cluster.checkpoint.opening import open_checkpoint
from cluster.config import ClusterConfig
from cluster.engine.load import load_engine
from cluster.engine.loop import EngineLoop
from cluster.engine.step_record import open_step_record
from cluster.evolving import on_wire
from cluster.experts.dispatch import ExpertDispatcher
from cluster.metrics import DispatchMetrics, EngineMetrics, new_registry, report_version
from cluster.runtime.process import end_at_sigterm, num_sharers, prepare_process, process_info
from cluster.runtime.workers.directory import ShardDirectory, take_slot
from cluster.runtime.workers.progress import ProgressReport
from cluster.runtime.workers.transports import lanes_of, make_transport
from cluster.types import EngineRequest, EngineStats, SequenceUpdate

log = logging.getLogger(__name__)


@on_wire("cluster.runtime.actors")
class EngineActor:
    """An attention replica's engine, in a process with nothing else that is busy.

    The replica submits and cancels through one group of threads and waits for news in another.
    """

    def __init__(
        self, config: ClusterConfig, replica: str, controller: Any, num_threads: int, record_path: str = ""
    ) -> None:
        """record_path: the file where the replica reads, when the engine has died, which requests it computed."""
        prepare_process(num_threads, computes=True)
        end_at_sigterm()
        registry = report_version(new_registry(), "engine")
        me = ray.get_runtime_context().current_actor
        process = take_slot(controller, replica, process_info(), me)
        place = str(process.slot) if process.slot >= 0 else replica  # in the metrics
        metrics = DispatchMetrics(registry, place)
        self.directory = ShardDirectory(controller, replica, process, me, metrics.plan_epoch)
        transport = make_transport(config, self.directory, metrics)
        experts = ExpertDispatcher(
            transport,
            self.directory,
            metrics,
            shard_timeout_s=config.shard_timeout_s,
            recovery_timeout_s=config.recovery_timeout_s,
            lanes=lanes_of(transport),
        )
        reader = open_checkpoint(config.model)
        reader.check_names()
        total = reader.missing_bytes(dense_shapes(reader.config)) + dense_bytes(reader.config, reader.config.dtype)
        engine = load_engine(
            config.model,
            config.engine(),
            experts,
            EngineMetrics(registry, place),
            ProgressReport(controller, replica, total),
            remote_experts=True,
            **({"on_step": open_step_record(record_path).write} if record_path else {}),
            wait_for_experts=self.directory.wait_ready,
            num_sharers=num_sharers(config, ray.nodes()),
        )
        self.loop = EngineLoop(engine)
        self.loop.start()
        log.info("engine %s is loaded, %d KV cache blocks", replica, engine.blocks.num_blocks)

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
    def stats(self) -> EngineStats:
        return self.loop.stats()

    @ray.method(concurrency_group="poll")
    def poll(self, timeout_s: float, received: int) -> tuple[int, list[SequenceUpdate]]:
        """As `EngineLoop.poll`: one message a step for all sequences, or one for several when asked late."""
        return self.loop.poll(timeout_s, received)


ENGINE_GROUPS = {"control": 1, "poll": 1, "watch": 1}
