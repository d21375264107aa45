"""The Ray actors that compute: an expert shard, an engine. Each is a thin shell around a part that knows no Ray."""

import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import ray
import torch
from torch import Tensor

from cluster.checkpoint.info import resolve_dtype
from cluster.checkpoint.names import dense_bytes
from cluster.checkpoint.reader import CheckpointReader
from cluster.config import ClusterConfig
from cluster.config.resources import available_cpus
from cluster.engine.load import load_engine, resolve_device, torch_dtype
from cluster.engine.loop import EngineLoop
from cluster.engine.step_record import open_step_record
from cluster.errors import ShardUnavailable
from cluster.evolving import on_wire
from cluster.experts.dispatch import ExpertDispatcher
from cluster.experts.pulse import Pulse, Sign
from cluster.experts.shard import ExpertShard
from cluster.experts.transport import ExpertBatch
from cluster.logs import make_formatter
from cluster.metrics import DispatchMetrics, EngineMetrics, ShardMetrics, new_registry, report_version
from cluster.runtime.directory import ShardDirectory, take_slot
from cluster.runtime.process import num_sharers
from cluster.runtime.protocol import ClusterRecord, ProcessInfo, process_info
from cluster.runtime.transports import decode, make_transport, to_bytes
from cluster.stream.frames import StreamOffer
from cluster.stream.server import StreamServer
from cluster.types import EngineRequest, EngineStats, SequenceUpdate

log = logging.getLogger(__name__)

REPORT_INTERVAL_S = 0.5  # between two reports of a load's progress
SLOW_S = 0.3  # for each product of a shard that is slow as a rehearsal: longer than any patience for a copy
Disturbance = Literal["cut", "damage", "slow", "no memory"]
LOAD_FLUSH_INTERVAL_S = 1.0  # between two reports of the experts' loads to the metrics


def prepare_process(num_threads: int) -> None:
    """What every actor's process does first: log lines to Ray's log files, and no more threads than it was given."""
    # Ray has handlers of its own on the root logger, and Serve puts a buffer of 1000 lines in a replica's sys.stderr.
    handler = logging.StreamHandler(sys.__stderr__)
    title = ray._raylet.getproctitle().removeprefix("ray::").partition(".")[0]
    handler.setFormatter(make_formatter(ray.get_runtime_context().get_actor_name() or title))
    ours = logging.getLogger("cluster")
    ours.handlers, ours.propagate = [handler], False
    ours.setLevel(logging.INFO)
    warnings.filterwarnings("ignore", message="The given buffer is not writable")  # rows are only read
    torch.set_num_threads(min(num_threads, available_cpus()))
    if ray.get_gpu_ids() and not torch.cuda.is_available():
        log.warning("Ray gave this process GPUs %s, but its torch has no CUDA", ray.get_gpu_ids())


def end_at_sigterm() -> None:
    """Ray's own handler waits for the calls under way, `hold` among them, which never end: the process would hang, and
    those who wait for it would find out by its silence only. Nothing here needs a farewell: call it in the main thread.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class ProgressReport:
    """Tells the controller how far a load is, a few times a second."""

    def __init__(self, controller: Any, name: str, total_bytes: int) -> None:
        self._controller, self._name, self._total = controller, name, total_bytes
        self._loaded, self._last = 0, 0.0

    def __call__(self, num_bytes: int) -> None:
        self._loaded += num_bytes
        now = time.monotonic()
        if now - self._last > REPORT_INTERVAL_S or self._loaded >= self._total:
            self._last = now
            self._controller.report_load.remote(self._name, self._loaded, self._total)


@on_wire("cluster.runtime.actors")
class ExpertShardActor:
    """An expert shard's process. `forward` runs one call at a time; the other groups answer beside it."""

    def __init__(self, shard_id: int, num_threads: int) -> None:
        """shard_id: below 0 for a spare process, which becomes a shard later."""
        prepare_process(num_threads)
        end_at_sigterm()
        self.shard: ExpertShard | None = None
        self.record: ClusterRecord | None = None
        self.metrics: ShardMetrics
        self.become(shard_id)
        self._source = ("", "", "")  # model, dtype and device of what is held
        self._reported: dict[tuple[int, int], int] = {}
        self._slow_until = 0.0
        self._refuse_load = False
        self._pulse = Pulse()
        self._computing = threading.Lock()  # a Ray call and the stream's thread may come at once
        self._streams: StreamServer | None = None
        threading.Thread(target=self._flush_loads, name="loads", daemon=True).start()

    @ray.method(concurrency_group="control")
    def become(self, shard_id: int) -> None:
        """Is that shard from now on. Before it holds anything only."""
        self.shard_id = shard_id
        if shard_id >= 0:
            self.metrics = ShardMetrics(report_version(new_registry(), "shard"), shard_id)

    @ray.method(concurrency_group="control")
    def which(self) -> int:
        """The shard that this is; below 0 for a spare process."""
        return self.shard_id

    @ray.method(concurrency_group="load")
    def load(
        self,
        model_dir: str,
        experts: Mapping[int, Sequence[int]],
        dtype: str,
        device: str,
        controller: Any = None,
    ) -> int:
        """Holds `experts` from now on, while calls go on; returns the bytes of their weights.

        What is here of the same model, dtype and device is not read again. Raises CheckpointError, SetupError.
        """
        reader = CheckpointReader(model_dir)
        if self.shard is None or self._source != (model_dir, dtype, device):
            self.shard = None
            shard = ExpertShard(
                self.shard_id,
                reader.config,
                dtype=torch_dtype(resolve_dtype(dtype, reader.config)),
                device=resolve_device(device),
            )
            self._reported, self._source = {}, (model_dir, dtype, device)
        else:
            shard = self.shard
        if self._refuse_load:
            self._refuse_load = False
            raise MemoryError("no memory, as a rehearsal")
        held = {layer_id: set(layer.expert_ids) for layer_id, layer in shard.layers.items()}
        missing = sum(len(set(ids) - held.get(layer_id, set())) for layer_id, ids in experts.items())
        total = missing * reader.config.expert_bytes(reader.config.dtype)
        progress = ProgressReport(controller, f"shard-{self.shard_id}", total) if controller is not None else None
        shard.load(reader, experts, progress)
        self.shard = shard
        if self._streams is None:
            info = process_info()
            self._streams = StreamServer(
                _Computer(self, shard.device),
                host=ray.util.get_node_ip_address(),
                node=info.node_id,
                pulse=self._pulse,
            )
            self._streams.start()
        self.metrics.weights_bytes(shard.num_bytes)
        num_experts = sum(len(ids) for ids in experts.values())
        log.info("shard %d holds %d experts (%d read), %d bytes", self.shard_id, num_experts, missing, shard.num_bytes)
        return shard.num_bytes

    def forward(self, *wire: Any) -> bytes:
        """One `WireBatch` in, the rows' weighted sums [T, H] in their dtype out. Raises ShardUnavailable."""
        if self.shard is None:
            raise ShardUnavailable(f"shard {self.shard_id} is loading", self.shard_id)
        waited_s = max(0.0, time.time() - wire[0])  # hosts' clocks may differ
        device = self.shard.device
        self._pulse.begin(on_cpu=device.type == "cpu")
        try:
            return to_bytes(self.compute(decode(wire, device), waited_s))
        finally:
            self._pulse.end()

    def compute(self, batch: ExpertBatch, waited_s: float) -> Tensor:
        """[T, H] in the rows' dtype, whichever carrier brought them. Raises ShardUnavailable."""
        self.metrics.queue_wait(waited_s)
        started = time.monotonic()
        if started < self._slow_until:
            time.sleep(SLOW_S)
        with self._computing:
            if self.shard is None:
                raise ShardUnavailable(f"shard {self.shard_id} is loading", self.shard_id)
            out = self.shard.forward(batch.layer_id, batch.hidden_states, batch.topk_ids, batch.topk_weights)
        self.metrics.computed(time.monotonic() - started, batch.hidden_states.shape[0])
        return out

    @ray.method(concurrency_group="control")
    def stream_offer(self) -> StreamOffer | None:
        """How to reach this shard's stream; None before it is loaded."""
        return None if self._streams is None else self._streams.offer

    @ray.method(concurrency_group="control")
    def sign(self) -> Sign:
        """How far the work is; answered while it goes on."""
        return self._pulse.sign()

    @ray.method(concurrency_group="control")
    def process(self) -> ProcessInfo:
        return process_info()

    @ray.method(concurrency_group="control")
    def held(self) -> dict[int, tuple[int, ...]]:
        """Layer id -> ids of the experts held; empty before the load is through."""
        shard = self.shard
        return {} if shard is None else {i: layer.expert_ids for i, layer in list(shard.layers.items())}

    @ray.method(concurrency_group="control")
    def expert_tokens(self) -> Tensor | None:
        """[layers, E] int64: rows that each expert has computed here since the start; None before it is loaded."""
        return None if self.shard is None else self.shard.expert_tokens.cpu()

    @ray.method(concurrency_group="control")
    def remember(self, record: ClusterRecord) -> None:
        """Keeps what a successor of the controller must know."""
        self.record = record

    @ray.method(concurrency_group="control")
    def recall(self) -> ClusterRecord | None:
        return self.record

    @ray.method(concurrency_group="watch")
    def hold(self) -> None:
        """Never returns: whoever waits for it hears of this process's death at once."""
        threading.Event().wait()

    @ray.method(concurrency_group="control")
    def disturb(self, what: Disturbance, seconds: float) -> None:
        """A fault to rehearse recovery with: ends all streams, damages the next answer on one, computes slowly for
        some seconds, or finds no memory for the next load."""
        if what == "cut" and self._streams is not None:
            self._streams.cut()
        elif what == "damage" and self._streams is not None:
            self._streams.damage()
        elif what == "slow":
            self._slow_until = time.monotonic() + seconds
        elif what == "no memory":
            self._refuse_load = True

    def _flush_loads(self) -> None:
        while True:
            time.sleep(LOAD_FLUSH_INTERVAL_S)
            shard = self.shard
            if shard is None:
                continue
            for layer_id, counts in enumerate(shard.expert_tokens.tolist()):
                for expert_id, count in enumerate(counts):
                    news = count - self._reported.get((layer_id, expert_id), 0)
                    if news > 0:
                        self._reported[layer_id, expert_id] = count
                        self.metrics.expert_tokens(layer_id, expert_id, news)


class _Computer:
    """What a shard's stream computes with."""

    def __init__(self, actor: ExpertShardActor, device: torch.device) -> None:
        self.device = device
        self.forward = actor.compute


@on_wire("cluster.runtime.actors")
class EngineActor:
    """An attention replica's engine, in a process with nothing else that is busy.

    The replica submits and cancels through one group of threads and waits for news in another.
    """

    def __init__(
        self, config: ClusterConfig, replica: str, controller: Any, num_threads: int, record_path: str = ""
    ) -> None:
        """record_path: where the replica reads whom the engine computed, when it has died."""
        prepare_process(num_threads)
        end_at_sigterm()
        registry = report_version(new_registry(), "engine")
        me = ray.get_runtime_context().current_actor
        process = take_slot(controller, replica, process_info(), me)
        place = str(process.slot) if process.slot >= 0 else replica  # in the metrics
        metrics = DispatchMetrics(registry, place)
        self.directory = ShardDirectory(controller, replica, process, me, metrics.plan_epoch)
        experts = ExpertDispatcher(
            make_transport(config, self.directory, metrics),
            self.directory,
            metrics,
            shard_timeout_s=config.shard_timeout_s,
            recovery_timeout_s=config.recovery_timeout_s,
        )
        reader = CheckpointReader(config.model)
        reader.check_names()
        total = dense_bytes(reader.config, reader.config.dtype)
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
        """As a shard's: whoever waits for it hears of this process's death at once."""
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


SHARD_GROUPS = {"control": 1, "watch": 1, "load": 1}
ENGINE_GROUPS = {"control": 1, "poll": 1, "watch": 1}
