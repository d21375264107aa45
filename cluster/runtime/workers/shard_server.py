"""One shard's experts as its process serves them: loads them, computes one batch at a time, counts. Knows no Ray."""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from cluster.checkpoint.info import resolve_dtype
from cluster.checkpoint.opening import open_checkpoint
from cluster.config import ClusterConfig
from cluster.config.lora import AdapterList
from cluster.config.quantization import PLAIN
from cluster.engine.load import resolve_device, torch_dtype
from cluster.errors import SetupError, ShardUnavailable
from cluster.experts.shard import ExpertShard
from cluster.experts.transport import ExpertBatch
from cluster.idle_memory import idle_memory
from cluster.kernels.stored import quantization_on
from cluster.metrics import ShardMetrics
from cluster.runtime.workers.rehearsal import Rehearsal
from cluster.tracing.products import Product, ShardTracing
from cluster.tracing.settings import TracingSettings

log = logging.getLogger(__name__)

REPORT_INTERVAL_S = 1.0  # between two reports of the experts' tokens to the metrics


class ShardServer:
    """One thread may call `load`; any threads may call the rest."""

    def __init__(self, shard_id: int, metrics: ShardMetrics, rehearsal: Rehearsal) -> None:
        self.shard_id = shard_id
        self._metrics = metrics
        self._rehearsal = rehearsal
        self._shard: ExpertShard | None = None
        self._source = ("", "", "", "")  # model, dtype, device and quantization of the loaded experts
        self.tracing = ShardTracing(shard_id)
        self._reported: dict[tuple[int, int], int] = {}
        self._computing = threading.Lock()  # a Ray call and the stream's thread may come at once
        threading.Thread(target=self._report, name="loads", daemon=True).start()

    @property
    def loaded(self) -> ExpertShard | None:
        """None before the first load is through."""
        return self._shard

    def shard(self) -> ExpertShard:
        """Raises ShardUnavailable before the first load is through."""
        if self._shard is None:
            raise ShardUnavailable(f"shard {self.shard_id} is loading", self.shard_id)
        return self._shard

    def load(
        self,
        model_dir: str,
        experts: Mapping[int, Sequence[int]],
        *,
        dtype: str,
        device: str,
        progress: Callable[[int], Callable[[int], None] | None],
        quantization: str = PLAIN,
    ) -> ExpertShard:
        """Holds `experts` from now on, while calls go on. Experts that are here, of the same model, dtype, device and
        quantization, are not read again. Raises CheckpointError, SetupError.

        model_dir: or a name on the hub; the files with the missing experts are downloaded.
        progress: from the bytes that will be downloaded and read, the callback for each piece of them.
        """
        reader = open_checkpoint(model_dir)
        source = (model_dir, dtype, device, quantization)
        if self._shard is None or self._source != source:
            self._shard = None
            shard = ExpertShard(
                self.shard_id,
                reader.config,
                dtype=torch_dtype(resolve_dtype(dtype, reader.config)),
                device=resolve_device(device),
                quantization=quantization_on(quantization, resolve_device(device), reader.config.stored_experts),
            )
            self._reported, self._source = {}, source
        else:
            shard = self._shard
        self._rehearsal.before_load()
        here = {layer_id: set(layer.expert_ids) for layer_id, layer in shard.layers.items()}
        missing = sum(len(set(ids) - here.get(layer_id, set())) for layer_id, ids in experts.items())
        tensors = shard.missing_tensors(experts)
        num_bytes = reader.missing_bytes(tensors) + missing * reader.config.expert_bytes(reader.config.dtype)
        report = progress(num_bytes)
        reader.fetch(tensors, report)
        shard.load(reader, experts, report)
        self._shard = shard
        self._metrics.weights_bytes(shard.num_bytes)
        num_experts = sum(len(ids) for ids in experts.values())
        log.info("shard %d holds %d experts (%d read), %d bytes", self.shard_id, num_experts, missing, shard.num_bytes)
        return shard

    def adapt(self, wanted: AdapterList) -> None:
        """Holds the adapters' part of its experts from now on, while calls go on. Raises CheckpointError,
        ShardUnavailable before the first load is through."""
        self.shard().adapt(wanted)
        self._metrics.weights_bytes(self.shard().num_bytes)

    def trace(self, config: ClusterConfig) -> None:
        """Sends traces as it says, from now on. On a node without the packages it sends none, and computes as ever."""
        try:
            self.tracing.follow(TracingSettings.of(config))
        except SetupError as error:
            self.tracing.follow(None)
            log.error("shard %d sends no traces: %s", self.shard_id, error)

    def compute(self, batch: ExpertBatch, waited_s: float) -> Tensor:
        """[T, H] in the rows' dtype, whichever carrier brought them. Raises ShardUnavailable."""
        self._metrics.queue_wait(waited_s)
        started = time.monotonic()
        self._rehearsal.before_product()
        with self._computing:
            out = self.shard().forward(batch.layer_id, batch.hidden_states, batch.topk_ids, batch.topk_weights)
            idle_memory.worked(batch.hidden_states.shape[0])
        self._metrics.computed(time.monotonic() - started, batch.hidden_states.shape[0])
        return out

    def experts(self) -> ExpertShard | None:
        """As of `SteadyBackend`."""
        return self._shard if self._rehearsal.is_quiet else None

    def computed(self, products: Sequence[Product], tokens: Tensor) -> None:
        """As of `SteadyBackend`."""
        for rows, waited_s, computed_s in products:
            self._metrics.queue_wait(waited_s)
            self._metrics.computed(computed_s, rows)
        with self._computing:
            if self._shard is not None and self._shard.expert_tokens.shape == tokens.shape:
                self._shard.expert_tokens.add_(tokens)

    def _send_traces(self) -> None:
        try:
            self.tracing.send()
        except Exception:  # the reports of loads hang on this thread
            log.exception("shard %d sends no traces", self.shard_id)
            self.tracing.follow(None)

    def _report(self) -> None:
        while True:
            time.sleep(REPORT_INTERVAL_S)
            self._send_traces()
            shard = self._shard
            if shard is None:
                continue
            for layer_id, counts in enumerate(shard.expert_tokens.tolist()):
                for expert_id, count in enumerate(counts):
                    new_tokens = count - self._reported.get((layer_id, expert_id), 0)
                    if new_tokens > 0:
                        self._reported[layer_id, expert_id] = count
                        self._metrics.expert_tokens(layer_id, expert_id, new_tokens)
