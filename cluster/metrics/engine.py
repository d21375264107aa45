"""The figures of one engine, which it knows nothing of: callers hand in plain numbers."""

from prometheus_client import CollectorRegistry

from cluster.metrics.definitions import Definitions

# A decode step of a tiny model to a prefill of 2048 tokens on a CPU.
_STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
# Powers of two: batch sizes are compared by doubling.
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# Nothing in an idle system, seconds under overload.
_WAIT_BUCKETS = (0.0001, 0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

# Series that exist from the start: `rate` and alerts miss the first event of one that appears with it.
_FINISH_REASONS = ("stop", "length", "cancelled", "error")


class _Sequences:
    """The sequences of one engine, from their arrival to their end."""

    def __init__(self, define: Definitions, replica: str) -> None:
        self.running = define.gauge(
            "moecluster_engine_running_sequences",
            "Sequences that hold KV blocks. At max_num_seqs the batch is full: raise it if blocks are left.",
            "livesum",
            "replica",
        ).labels(replica)
        self.held = define.gauge(
            "moecluster_engine_held_sequences",
            "Running sequences that wait for an expert without a living copy while others go on. Above zero for longer "
            "than a respawn takes: look for the shard that does not come up; min_copies=2 avoids it.",
            "livesum",
            "replica",
        ).labels(replica)
        self.waiting = define.gauge(
            "moecluster_engine_waiting_sequences",
            "Sequences that wait for blocks or a place in the batch. Above zero for minutes: add attention replicas.",
            "livesum",
            "replica",
        ).labels(replica)
        self.queue_wait = define.histogram(
            "moecluster_engine_queue_wait_seconds",
            "From a sequence's arrival to its first step. The part of the time to first token that more "
            "replicas take away.",
            _WAIT_BUCKETS,
            "replica",
        ).labels(replica)
        self.finished = define.counter(
            "moecluster_engine_finished_sequences_total",
            "Sequences that ended, by finish reason (stop, length, cancelled, error). Alert on error; many"
            " cancelled ones are clients that gave up waiting.",
            "replica",
            "reason",
        )


class _Cache:
    """The KV cache of one engine."""

    def __init__(self, define: Definitions, replica: str) -> None:
        self.reused_tokens = define.counter(
            "moecluster_engine_reused_tokens_total",
            "Prompt tokens that were not computed because the cache had their keys and values. Its share of all "
            "prompt tokens is what prefix caching saves.",
            "replica",
        ).labels(replica)
        self.used_blocks = define.gauge(
            "moecluster_engine_kv_used_blocks",
            "KV blocks in use; where windows slide, by the share of the group of layers that has the least left. Near "
            "the capacity sequences get preempted; above zero with nothing running is a leak.",
            "livesum",
            "replica",
        ).labels(replica)
        self.capacity_blocks = define.gauge(
            "moecluster_engine_kv_capacity_blocks",
            "KV blocks that there are. Divide used blocks by it; kv_cache_bytes sets it.",
            "livesum",
            "replica",
        ).labels(replica)
        self.preemptions = define.counter(
            "moecluster_engine_preemptions_total",
            "Sequences thrown out of the KV cache to be computed again. Steadily growing: raise "
            "kv_cache_bytes or lower max_num_seqs.",
            "replica",
        ).labels(replica)


class _Steps:
    """The steps of one engine."""

    def __init__(self, define: Definitions, replica: str) -> None:
        self.seconds = define.histogram(
            "moecluster_engine_step_seconds",
            "One engine step, experts included. Bounds the inter-token latency; compare with dispatch "
            "round trips times sparse layers to see what the experts cost.",
            _STEP_BUCKETS,
            "replica",
        ).labels(replica)
        self.sequences = define.histogram(
            "moecluster_engine_step_sequences",
            "Sequences in one step. Small while sequences wait: the token budget or the blocks hold the batch back.",
            _BATCH_BUCKETS,
            "replica",
        ).labels(replica)
        tokens = define.counter(
            "moecluster_engine_step_tokens_total",
            "Tokens computed, by phase (prefill, decode). More prefill than prompt tokens arrive is "
            "recomputed work after preemptions.",
            "replica",
            "phase",
        )
        self.drafted_tokens = define.counter(
            "moecluster_engine_drafted_tokens_total",
            "Tokens that were drafted ahead and tried as rows of a step (speculative_config). Still while answers are "
            "generated: the text does not repeat itself, or drafts were measured not to pay.",
            "replica",
        ).labels(replica)
        self.accepted_tokens = define.counter(
            "moecluster_engine_accepted_tokens_total",
            "Drafted tokens that were right, each a step saved for its sequence. Divide by the drafted ones.",
            "replica",
        ).labels(replica)
        self.prefill_tokens = tokens.labels(replica, "prefill")
        self.decode_tokens = tokens.labels(replica, "decode")


class EngineMetrics:
    """One attention replica's engine."""

    def __init__(self, registry: CollectorRegistry, replica: str) -> None:
        define = Definitions(registry)
        self._replica = replica
        self._sequences = _Sequences(define, replica)
        self._cache = _Cache(define, replica)
        self._steps = _Steps(define, replica)
        self._reasons = {reason: self._sequences.finished.labels(replica, reason) for reason in _FINISH_REASONS}

    def state(self, running: int, held: int, waiting: int, used_blocks: int, total_blocks: int) -> None:
        self._sequences.running.set(running)
        self._sequences.held.set(held)
        self._sequences.waiting.set(waiting)
        self._cache.used_blocks.set(used_blocks)
        self._cache.capacity_blocks.set(total_blocks)

    def step(self, seconds: float, num_prefill_tokens: int, num_decode_tokens: int, num_seqs: int) -> None:
        self._steps.seconds.observe(seconds)
        self._steps.sequences.observe(num_seqs)
        self._steps.prefill_tokens.inc(num_prefill_tokens)
        self._steps.decode_tokens.inc(num_decode_tokens)

    def drafted(self, num_tokens: int, num_accepted: int) -> None:
        """Counts drafted tokens that a step has tried, and those of them that were right."""
        self._steps.drafted_tokens.inc(num_tokens)
        self._steps.accepted_tokens.inc(num_accepted)

    def reused(self, num_tokens: int) -> None:
        """Counts prompt tokens whose keys and values another sequence left in the cache."""
        self._cache.reused_tokens.inc(num_tokens)

    def preempted(self) -> None:
        self._cache.preemptions.inc()

    def finished(self, reason: str) -> None:
        child = self._reasons.get(reason)
        if child is None:
            child = self._reasons[reason] = self._sequences.finished.labels(self._replica, reason)
        child.inc()

    def queue_wait(self, seconds: float) -> None:
        self._sequences.queue_wait.observe(seconds)
