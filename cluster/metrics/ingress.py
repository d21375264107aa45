"""The figures of clients' requests, which it knows nothing of: callers hand in plain numbers."""

from typing import Literal

from prometheus_client import CollectorRegistry, Counter

from cluster.metrics.definitions import Definitions
from cluster.metrics.exemplars import Exemplars
from cluster.metrics.process import exemplars_path

# From a GPU's single prefill step to a prompt that waited for a minute in a full queue.
_FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
# Steps take 5 to 50 ms on a GPU, 60 to 300 ms on two CPU cores; finest where readers notice (20 to 150 ms).
_INTER_TOKEN_BUCKETS = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
# One short answer to a whole context.
_REQUEST_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

# Series that exist from the start: `rate` and alerts miss the first event of one that appears with it.
_ERROR_OUTCOMES = (
    "invalid_argument", "not_found", "unauthenticated", "permission_denied", "resource_exhausted", "deadline_exceeded",
    "unimplemented", "unavailable", "internal",
)  # fmt: skip
_TRACED = {
    "first_token": ("moecluster_time_to_first_token_seconds", _FIRST_TOKEN_BUCKETS),
    "end_to_end": ("moecluster_request_duration_seconds", _REQUEST_BUCKETS),
}
_RESULTS = ("Score", "Embed", "Classify", "ClassifyTokens", "AnswerSpan")
_OUTCOMES = ("stop", "length", "cancelled", *_ERROR_OUTCOMES)


def _balanced(define: Definitions) -> dict[str, Counter]:
    """A counter for each place of the beginning of a prompt."""
    balanced = define.counter(
        "moecluster_balanced_requests_total",
        "Requests by where their prompt's beginning was: hit, at their replica; busy, at replicas with too many "
        "requests; new, nowhere. Many busy ones: add attention replicas.",
        "outcome",
    )
    return {outcome: balanced.labels(outcome) for outcome in ("hit", "busy", "new")}


def _results(define: Definitions) -> dict[str, Counter]:
    """A counter for each method that gives numbers."""
    results = define.counter(
        "moecluster_results_total",
        "Requests that were answered with numbers in place of new tokens, by the method that was called. Their "
        "share of all requests tells what the prompt tokens are for: these have no decode steps.",
        "method",
    )
    return {method: results.labels(method) for method in _RESULTS}


class IngressMetrics:
    """Requests as clients see them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        define, self._exemplars = Definitions(registry), Exemplars(exemplars_path())
        self._requests = define.counter(
            "moecluster_requests_total",
            "Requests that ended, by outcome: a finish reason (stop, length) or the gRPC code of the error"
            " in lower case; a call that ended before it was a request counts by its refusal. Alert on the share of "
            "unavailable, internal and deadline_exceeded; "
            "resource_exhausted asks for more attention replicas.",
            "outcome",
        )
        self._running = define.gauge(
            "moecluster_requests_running",
            "Requests accepted and not yet ended. Compare with max_ongoing_requests; one that stays above "
            "zero without load is a leak.",
            "livesum",
        )
        self._first_token = define.histogram(
            "moecluster_time_to_first_token_seconds",
            "From a request's arrival to its first token. If it grows while engine queue wait does not, "
            "prompts got longer; if both grow, add attention replicas.",
            _FIRST_TOKEN_BUCKETS,
        )
        self._inter_token = define.histogram(
            "moecluster_inter_token_latency_seconds",
            "Between two tokens of one answer. If it grows, look at engine step time, then at the dispatch"
            " round trip and the shards' compute time.",
            _INTER_TOKEN_BUCKETS,
        )
        self._end_to_end = define.histogram(
            "moecluster_request_duration_seconds",
            "From a request's arrival to its last token, or to its numbers, of requests that were answered. Read it "
            "beside the tokens: long answers take long.",
            _REQUEST_BUCKETS,
        )
        self._replays = define.counter(
            "moecluster_request_replays_total",
            "Times that a request went on at another attention replica because its own died. Growing without deploys: "
            "look why replicas die.",
        )
        self._prompt_tokens = define.counter(
            "moecluster_prompt_tokens_total",
            "Tokens of accepted prompts. Its rate is the prefill load to plan capacity for.",
        )
        self._generated_tokens = define.counter(
            "moecluster_generated_tokens_total",
            "Tokens sent to clients. Its rate is the throughput; a fall while requests run is a fault.",
        )
        self._outcomes = {outcome: self._requests.labels(outcome) for outcome in _OUTCOMES}
        self._results = _results(define)
        self._balanced = _balanced(define)

    def started(self) -> None:
        """A request arrived; `finished` must follow."""
        self._running.inc()

    def replayed(self) -> None:
        self._replays.inc()

    def finished(self, outcome: str) -> None:
        """A request ended. outcome: a finish reason or a gRPC code in lower case, never free text."""
        self._running.dec()
        child = self._outcomes.get(outcome)
        if child is None:
            child = self._outcomes[outcome] = self._requests.labels(outcome)
        child.inc()

    def first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def inter_token(self, seconds: float, num_tokens: int) -> None:
        """`num_tokens` came `seconds` after those before: each counts as one observation, of its part of the time."""
        for _ in range(num_tokens):
            self._inter_token.observe(seconds / num_tokens)

    def end_to_end(self, seconds: float) -> None:
        self._end_to_end.observe(seconds)

    def example(self, of: Literal["first_token", "end_to_end"], seconds: float, trace_id: str) -> None:
        """A traced request had this time."""
        metric, buckets = _TRACED[of]
        self._exemplars.note(metric, buckets, seconds, trace_id)

    def result(self, method: str) -> None:
        """method: the rpc's name, one of those that give numbers."""
        self._results[method].inc()

    def prompt_tokens(self, n: int) -> None:
        self._prompt_tokens.inc(n)

    def balanced(self, outcome: str) -> None:
        """outcome: "hit", "busy" or "new"."""
        self._balanced[outcome].inc()

    def generated_tokens(self, n: int) -> None:
        self._generated_tokens.inc(n)
