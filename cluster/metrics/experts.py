"""The figures of traffic between replicas and shards, of the shards' work, of the controller. In plain numbers."""

from prometheus_client import CollectorRegistry, Counter

from cluster.metrics.definitions import Definitions

# Sockets answer in 0.2 ms, Ray calls in 2 to 6 ms, a hung shard at its deadline of 30 s.
_ROUND_TRIP_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 5, 30)
# One layer's experts: 0.1 ms for a few rows on a GPU, 0.1 s and more for a prefill on one CPU core.
_COMPUTE_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)
# Nothing in an idle system, seconds under overload.
_WAIT_BUCKETS = (0.0001, 0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class _ShardTraffic:
    """One replica's counters toward one shard."""

    __slots__ = ("fallbacks", "hedged", "received_bytes", "rerouted", "round_trip", "rows", "sent_bytes")

    def __init__(self, define: Definitions, replica: str, shard_id: int) -> None:
        labels = ("replica", "shard_id")
        self.rows = define.counter(
            "moecluster_dispatch_rows_total",
            "Rows sent to a shard, a row being one token at one layer. Uneven rates between shards: rebalance.",
            *labels,
        ).labels(replica, shard_id)
        self.sent_bytes = define.counter(
            "moecluster_dispatch_sent_bytes_total",
            "Payload sent to a shard. Compare its rate with what the network carries.",
            *labels,
        ).labels(replica, shard_id)
        self.received_bytes = define.counter(
            "moecluster_dispatch_received_bytes_total",
            "Payload that came back from a shard. Compare its rate with what the network carries.",
            *labels,
        ).labels(replica, shard_id)
        self.round_trip = define.histogram(
            "moecluster_dispatch_round_trip_seconds",
            "From sending rows to a shard to having its answer. Take the shard's compute and queue wait "
            "off it: the rest is the carrier.",
            _ROUND_TRIP_BUCKETS,
            *labels,
        ).labels(replica, shard_id)
        self.fallbacks = define.counter(
            "moecluster_dispatch_fallbacks_total",
            "Batches that went over Ray calls because the stream to this shard was down. Growing: look for the "
            "stream's error in the replica's log.",
            *labels,
        ).labels(replica, shard_id)
        self.hedged = define.counter(
            "moecluster_dispatch_hedged_total",
            "Batches that were also asked of another copy because this shard was late. Growing: the shard is slow, "
            "look at its compute time and its node.",
            *labels,
        ).labels(replica, shard_id)
        self.rerouted = define.counter(
            "moecluster_dispatch_rerouted_rows_total",
            "Rows sent again because this shard failed them. Growing: look at that shard's log and respawns.",
            *labels,
        ).labels(replica, shard_id)


class DispatchMetrics:
    """One attention replica's traffic with the shards."""

    def __init__(self, registry: CollectorRegistry, replica: str) -> None:
        self._define = Definitions(registry)
        self._replica = replica
        self._shards: dict[int, _ShardTraffic] = {}
        self._plan_epoch = self._define.gauge(
            "moecluster_dispatch_plan_epoch",
            "Epoch of the placement plan that this replica has. Behind the controller's for more than"
            " a few seconds: the replica does not hear of new plans.",
            "livemostrecent",
            "replica",
        ).labels(replica)

    def sent(self, shard_id: int, rows: int, num_bytes: int) -> None:
        shard = self._shards.get(shard_id) or self._shard(shard_id)
        shard.rows.inc(rows)
        shard.sent_bytes.inc(num_bytes)

    def returned(self, shard_id: int, seconds: float, num_bytes: int) -> None:
        """An answer is back. seconds: since it was sent."""
        shard = self._shards.get(shard_id) or self._shard(shard_id)
        shard.round_trip.observe(seconds)
        shard.received_bytes.inc(num_bytes)

    def fell_back(self, shard_id: int) -> None:
        """A batch goes over Ray because the shard's stream is down."""
        (self._shards.get(shard_id) or self._shard(shard_id)).fallbacks.inc()

    def hedged(self, shard_id: int) -> None:
        """A batch is also asked of another copy. shard_id: the late shard."""
        (self._shards.get(shard_id) or self._shard(shard_id)).hedged.inc()

    def rerouted(self, shard_id: int, rows: int) -> None:
        """Rows are sent again. shard_id: the shard that failed them, not the one that gets them now."""
        (self._shards.get(shard_id) or self._shard(shard_id)).rerouted.inc(rows)

    def plan_epoch(self, epoch: int) -> None:
        self._plan_epoch.set(epoch)

    def _shard(self, shard_id: int) -> _ShardTraffic:
        return self._shards.setdefault(shard_id, _ShardTraffic(self._define, self._replica, shard_id))


class ShardMetrics:
    """One expert shard."""

    def __init__(self, registry: CollectorRegistry, shard_id: int) -> None:
        define = Definitions(registry)
        self._compute = define.histogram(
            "moecluster_shard_compute_seconds",
            "One grouped expert product. Its sum's rate is the share of time that the shard works: near 1, add shards.",
            _COMPUTE_BUCKETS,
            "shard_id",
        ).labels(shard_id)
        self._rows = define.counter(
            "moecluster_shard_rows_total",
            "Rows computed. One shard far above the others holds too many busy experts: rebalance.",
            "shard_id",
        ).labels(shard_id)
        self._queue_wait = define.histogram(
            "moecluster_shard_queue_wait_seconds",
            "From a batch's arrival to its computation. Above the compute time: the shard is the bottleneck.",
            _WAIT_BUCKETS,
            "shard_id",
        ).labels(shard_id)
        self._weights_bytes = define.gauge(
            "moecluster_shard_weights_bytes",
            "Bytes of the expert weights that the shard holds. Keep it below its memory with room for batches.",
            "livesum",
            "shard_id",
        ).labels(shard_id)
        self._expert_tokens = define.counter(
            "moecluster_expert_tokens_total",
            "Tokens routed to an expert, all its copies together. The load that rebalancing evens out.",
            "layer_id",
            "expert_id",
        )
        self._experts: dict[tuple[int, int], Counter] = {}

    def computed(self, seconds: float, rows: int) -> None:
        self._compute.observe(seconds)
        self._rows.inc(rows)

    def queue_wait(self, seconds: float) -> None:
        self._queue_wait.observe(seconds)

    def expert_tokens(self, layer_id: int, expert_id: int, count: int) -> None:
        child = self._experts.get((layer_id, expert_id))
        if child is None:
            child = self._experts[layer_id, expert_id] = self._expert_tokens.labels(layer_id, expert_id)
        child.inc(count)

    def weights_bytes(self, n: int) -> None:
        self._weights_bytes.set(n)


# Series that exist from the start: `rate` misses the first event of one that appears with it.
CHANGES = ("rebalance", "settle", "add", "remove", "shuffle", "drain")


class ControllerMetrics:
    """The expert controller's view of the shards."""

    def __init__(self, registry: CollectorRegistry) -> None:
        define = Definitions(registry)
        self._plan_epoch = define.gauge(
            "moecluster_controller_plan_epoch",
            "Epoch of the published placement plan. Absent: no controller runs, and nobody replaces a shard that dies.",
            "livemostrecent",
        )
        self._up = define.gauge(
            "moecluster_controller_up_shards",
            "Shards that answer. Alert when it stays below wanted shards.",
            "livemostrecent",
        )
        self._wanted = define.gauge(
            "moecluster_controller_wanted_shards",
            "Shards that the configuration asks for. Compare with up shards.",
            "livemostrecent",
        )
        self._respawns = define.counter(
            "moecluster_controller_respawns_total",
            "Times that a dead shard was made again. One that grows steadily dies of the same thing: read its log.",
            "shard_id",
        )
        coverage = define.gauge(
            "moecluster_controller_experts",
            "Experts, over all layers, by loaded copies (0, 1, 2+). Page on any with 0: requests wait or "
            "fail. With 1 the next death makes requests wait for the shard's successor.",
            "livemostrecent",
            "copies",
        )
        self._imbalance = define.gauge(
            "moecluster_controller_imbalance",
            "The slowest shard's load against the mean, summed over layers; 1 is even. Above 1.2 for long: rebalance.",
            "livemostrecent",
        )
        self._zero, self._one, self._more = (coverage.labels(copies) for copies in ("0", "1", "2+"))
        self._define_changes(define)

    def _define_changes(self, define: Definitions) -> None:
        self._changes = define.counter(
            "moecluster_controller_changes_total",
            "Changes of placement by kind (rebalance, settle, add, remove, shuffle, drain) and outcome. Failed ones: "
            "read the controller's log.",
            "kind",
            "outcome",
        )
        self._leaving = define.gauge(
            "moecluster_controller_leaving_shards",
            "Shards that still stand on nodes that Ray drains. Above 0 for longer than a load takes: no other node has "
            "room; `moe-cluster status` says for which, and until when the node stays.",
            "livemostrecent",
        )
        self._moved = define.counter(
            "moecluster_controller_moved_experts_total",
            "Experts that changes of placement have loaded anew. Growing all the time: raise the threshold.",
        )
        for kind in CHANGES:
            for outcome in ("done", "failed"):
                self._changes.labels(kind, outcome)

    def plan_epoch(self, epoch: int) -> None:
        self._plan_epoch.set(epoch)

    def shards(self, up: int, wanted: int) -> None:
        self._up.set(up)
        self._wanted.set(wanted)

    def expected(self, shard_id: int) -> None:
        """The configuration asks for this shard."""
        self._respawns.labels(shard_id)

    def respawned(self, shard_id: int) -> None:
        self._respawns.labels(shard_id).inc()

    def coverage(self, zero: int, one: int, more: int) -> None:
        self._zero.set(zero)
        self._one.set(one)
        self._more.set(more)

    def leaving(self, num_shards: int) -> None:
        """On nodes that Ray drains."""
        self._leaving.set(num_shards)

    def imbalance(self, value: float) -> None:
        self._imbalance.set(value)

    def changed(self, kind: str, outcome: str, num_moves: int) -> None:
        """A change of placement has ended. outcome: "done" or "failed"."""
        self._changes.labels(kind, outcome).inc()
        self._moved.inc(num_moves)
