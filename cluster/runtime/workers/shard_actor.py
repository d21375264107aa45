"""An expert shard's process: a Ray actor around `ShardServer`, which knows no Ray."""

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from cluster.config.lora import AdapterList
from cluster.config.quantization import PLAIN
from cluster.errors import ShardUnavailable
from cluster.evolving import on_wire
from cluster.experts.pulse import Pulse, Sign
from cluster.runtime.process import end_at_sigterm, prepare_process, process_info
from cluster.runtime.workers.progress import ProgressReport
from cluster.runtime.workers.protocol import NO_SHARD, ClusterRecord
from cluster.runtime.workers.rehearsal import Disturbance, Rehearsal
from cluster.status import ProcessInfo

if TYPE_CHECKING:  # torch, which those do without that only start this actor
    from torch import Tensor

    from cluster.runtime.workers.shard_server import ShardServer
    from cluster.stream.frames import StreamOffer
    from cluster.stream.server import StreamServer


@on_wire("cluster.runtime.actors", former=("_flush_loads", "compute"))
class ExpertShardActor:
    """`forward` runs one call at a time; the other groups answer beside it. A spare process has no server yet."""

    def __init__(self, shard_id: int, num_threads: int) -> None:
        """shard_id: NO_SHARD for a spare process, which becomes a shard later."""
        prepare_process()
        end_at_sigterm()
        from cluster.runtime.workers import computing, shard_carriers

        computing.prepare_to_compute(num_threads)
        self._carriers = shard_carriers
        self._rehearsal = Rehearsal()
        self._pulse = Pulse()
        self._server: ShardServer | None = None
        self._record: ClusterRecord | None = None
        self._streams: StreamServer | None = None
        self.become(shard_id)

    @ray.method(concurrency_group="control")
    def become(self, shard_id: int) -> None:
        """A spare process turns into that shard. NO_SHARD changes nothing: an older controller asks so whether this
        process lives."""
        if shard_id != NO_SHARD:
            self._server = self._carriers.make_server(shard_id, self._rehearsal)

    @ray.method(concurrency_group="control")
    def which(self) -> int:
        """Returns the shard that this process is, NO_SHARD for a spare one."""
        return NO_SHARD if self._server is None else self._server.shard_id

    @ray.method(concurrency_group="load")
    def load(
        self,
        model_dir: str,
        experts: Mapping[int, Sequence[int]],
        dtype: str,
        device: str,
        controller: Any = None,
        *,
        quantization: str = PLAIN,
    ) -> int:
        """As `ShardServer.load`; returns the bytes of the weights. controller: hears how far the load is."""
        server = self._serving()

        def report(total_bytes: int) -> ProgressReport | None:
            return None if controller is None else ProgressReport(controller, f"shard-{server.shard_id}", total_bytes)

        shard = server.load(model_dir, experts, dtype=dtype, device=device, quantization=quantization, progress=report)
        if self._streams is None:
            self._streams = self._carriers.start_stream(server, self._pulse)
        return shard.num_bytes

    @ray.method(concurrency_group="load")
    def adapt(self, wanted: AdapterList) -> None:
        """As `ShardServer.adapt`."""
        self._serving().adapt(wanted)

    def forward(self, *wire: Any) -> bytes:
        """One `WireBatch` in, the rows' weighted sums [T, H] in their dtype out. Raises ShardUnavailable."""
        return self._carriers.forward(self._serving(), self._pulse, wire)

    @ray.method(concurrency_group="control")
    def stream_offer(self) -> "StreamOffer | None":
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
        """Layer id -> ids of the loaded experts; empty before the load is through."""
        shard = None if self._server is None else self._server.loaded
        return {} if shard is None else {i: layer.expert_ids for i, layer in list(shard.layers.items())}

    @ray.method(concurrency_group="control")
    def expert_tokens(self, as_array: bool = False) -> "np.ndarray | Tensor | None":
        """[layers, E] int64: rows that each expert has computed here since the start; None before it is loaded.

        as_array: of numpy, for a caller without torch. Older versions ask for a tensor.
        """
        shard = None if self._server is None else self._server.loaded
        counts = None if shard is None else shard.expert_tokens.cpu()
        return counts.numpy() if counts is not None and as_array else counts

    @ray.method(concurrency_group="control")
    def remember(self, record: ClusterRecord) -> None:
        """Keeps what a successor of the controller must know, and sends traces as it says."""
        self._record = record
        if self._server is not None:
            self._server.trace(record.config)

    @ray.method(concurrency_group="control")
    def recall(self) -> ClusterRecord | None:
        return self._record

    @ray.method(concurrency_group="watch")
    def hold(self) -> None:
        """Never returns: its caller hears of this process's death at once."""
        threading.Event().wait()

    @ray.method(concurrency_group="control")
    def disturb(self, what: Disturbance, seconds: float) -> None:
        """As `Rehearsal.begin`."""
        self._rehearsal.begin(what, seconds, self._streams)
        if self._streams is not None:
            self._streams.wake()

    def _serving(self) -> "ShardServer":
        """Raises ShardUnavailable for a spare process: its caller's plan is not of this process."""
        if self._server is None:
            raise ShardUnavailable("this process waits to become a shard", NO_SHARD)
        return self._server


SHARD_GROUPS = {"control": 1, "watch": 1, "load": 1}
