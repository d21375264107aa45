"""The figures of the store of responses. Knows no response: its caller hands in plain numbers."""

from prometheus_client import CollectorRegistry

from cluster.metrics.definitions import Definitions

_REASONS = ("age", "room")  # series that exist from the start


class ResponseStoreMetrics:
    """Of the one store of a group."""

    def __init__(self, registry: CollectorRegistry) -> None:
        define = Definitions(registry)
        self._kept = define.gauge(
            "moecluster_responses_kept",
            "Responses of /v1/responses that clients can get again. At stored_responses the oldest go: raise it if "
            "clients miss theirs.",
            "livemostrecent",
        )
        self._bytes = define.gauge(
            "moecluster_responses_kept_bytes",
            "Memory of the kept responses. At stored_responses_bytes the oldest go: raise it if clients miss theirs.",
            "livemostrecent",
        )
        self._running = define.gauge(
            "moecluster_responses_running",
            "Kept responses that are still being made in the background. One that stays above zero without load: look "
            "for requests that wait (moecluster_engine_waiting_sequences).",
            "livemostrecent",
        )
        evicted = define.counter(
            "moecluster_responses_evicted_total",
            "Responses that the store let go by itself: age is stored_responses_age_s, room the other two limits. Many "
            "for room: raise stored_responses or stored_responses_bytes.",
            "reason",
        )
        self._evicted = {reason: evicted.labels(reason) for reason in _REASONS}

    def state(self, *, kept: int, kept_bytes: int, running: int) -> None:
        self._kept.set(kept)
        self._bytes.set(kept_bytes)
        self._running.set(running)

    def evicted(self, reason: str) -> None:
        """reason: age or room."""
        self._evicted[reason].inc()
