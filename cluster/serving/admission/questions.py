"""Short questions that need no key, Health.Check and List: bounded in number by host and in all.

An answer takes 0.2 ms of CPU, so all answers take 10 % of an ingress's one core, twice that at worst. An honest asker
does not meet the bounds: a Kubernetes probe asks once a second at most, grpc_health_probe once a run, a load balancer
every few seconds from each of its nodes; 100 of the fastest may share an address. The checks of our own HAProxy are not
counted: they ask Serve (`RayServeAPIService/Healthz`), which answers past admission.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from cluster.errors import Overloaded

MIN_RETRY_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionLimits:
    """max_per_host, max_questions: in a window of window_s seconds."""

    window_s: float = 10.0
    max_per_host: int = 1000
    max_questions: int = 5000


class Questions:
    """For one event loop. clock: monotonic seconds.

    When a window has `max_questions`, only hosts with less than an equal share of them are still answered: a flood from
    many addresses does not cost a probe its answer, and all shares together are `max_questions` once more at most.
    """

    def __init__(self, limits: QuestionLimits, clock: Callable[[], float]) -> None:
        self._limits, self._clock = limits, clock
        self._began_s = clock()
        self._asked: Counter[str] = Counter()
        self._num_asked = 0

    def ask(self, host: str) -> None:
        """Counts one question. Raises Overloaded."""
        limits, now = self._limits, self._clock()
        if now - self._began_s >= limits.window_s:
            self._began_s, self._num_asked = now, 0
            self._asked.clear()
        asked = self._asked[host] + 1
        if asked > limits.max_per_host:
            raise self._refusal(f"{limits.max_per_host} questions from one host in {limits.window_s:g} s", now)
        share = limits.max_questions / (len(self._asked) + (asked == 1))
        if self._num_asked >= limits.max_questions and asked > share:
            raise self._refusal(f"{limits.max_questions} questions in {limits.window_s:g} s", now)
        self._asked[host] = asked
        self._num_asked += 1

    def _refusal(self, limit: str, now: float) -> Overloaded:
        rest_s = self._began_s + self._limits.window_s - now
        return Overloaded.later(f"this server answers at most {limit} without a key", max(MIN_RETRY_S, rest_s))
