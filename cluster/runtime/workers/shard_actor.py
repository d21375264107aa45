"""An expert shard's process: a Ray actor around `ExpertShard`, which knows no Ray."""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import ray
import torch
from torch import Tensor

from cluster.checkpoint.info import resolve_dtype
from cluster.checkpoint.reader import CheckpointReader
from cluster.engine.load import resolve_device, torch_dtype
from cluster.errors import ShardUnavailable
from cluster.evolving import on_wire
from cluster.experts.pulse import Pulse, Sign
from cluster.experts.shard import ExpertShard
from cluster.experts.transport import ExpertBatch
from cluster.metrics import ShardMetrics, new_registry, report_version
from cluster.runtime.process import end_at_sigterm, prepare_process, process_info
from cluster.runtime.workers.progress import ProgressReport
from cluster.runtime.workers.protocol import ClusterRecord
from cluster.runtime.workers.transports import decode, to_bytes
from cluster.status import ProcessInfo
from cluster.stream.frames import StreamOffer
from cluster.stream.server import StreamServer

log = logging.getLogger(__name__)

SLOW_S = 0.3  # for each product of a shard that is slow as a rehearsal: longer than any patience for a copy
Disturbance = Literal["cut", "damage", "slow", "no memory"]
LOAD_FLUSH_INTERVAL_S = 1.0  # between two reports of the experts' loads to the metrics


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


SHARD_GROUPS = {"control": 1, "watch": 1, "load": 1}
