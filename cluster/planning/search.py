"""Finds the smallest cluster that keeps its promises under a load: tries shards and replicas in virtual time."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

import numpy as np

from cluster.errors import SetupError
from cluster.planning.costs import StepCosts, StepTime, StepWork
from cluster.planning.load import Lengths, OpenLoad
from cluster.planning.simulation import ClusterModel, Record, Simulation

PERCENTILE = 90  # of the requests, which get their first token and the others in time
MOST_REPLICAS = 4096
MIN_REQUESTS, MOST_REQUESTS, MIN_S = 300, 30_000, 30.0  # of a trial
MOST_RATE = MOST_REQUESTS / MIN_S
WARM_UP = 0.25  # of its requests, which find an empty cluster
LASTS = 4  # answers one after another that a trial is long
SLACK = 1.05  # of what was reached, for a promise that can be kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """rate: requests/s.  first_token_s, per_token_s: that PERCENTILE of the requests have at most."""

    rate: float
    lengths: Lengths
    first_token_s: float
    per_token_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A cluster under the goal's load. is_cut: its requests are fewer than its promises' seconds have. Seconds are
    (median, PERCENTILE) of the requests after the warm-up; of tokens after the first, 0 where an answer has one.
    """

    cluster: ClusterModel
    num_requests: int
    is_cut: bool
    record: Record
    requests_s: float
    first_token_s: tuple[float, float]
    per_token_s: tuple[float, float]

    def keeps(self, goal: Goal) -> bool:
        in_time = self.first_token_s[1] <= goal.first_token_s and self.per_token_s[1] <= goal.per_token_s
        return in_time and not self.record.refused

    def is_faster_than(self, other: "Trial") -> bool:
        """In the first token or the others, of PERCENTILE of the requests."""
        return self.first_token_s[1] < other.first_token_s[1] or self.per_token_s[1] < other.per_token_s[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """cluster: with one replica, and with as few shards as have room; its cores are one machine's, of which there are
    as many as the processes need.  most_shards: 0 for a dense model."""

    costs: StepCosts
    cluster: ClusterModel
    most_shards: int

    def find(self, goal: Goal) -> Trial:
        """The one with the fewest processes. Raises SetupError with the nearest possible goal."""
        best = self._best(goal)
        if best is not None:
            return best
        nearest = self._nearest(goal)
        raise SetupError(
            f"no cluster keeps --ttft {goal.first_token_s:g} and --itl {goal.per_token_s:g} at this load; the nearest "
            f"that one keeps: --ttft {nearest.first_token_s:.3g} --itl {nearest.per_token_s:.3g}"
        )

    def _best(self, goal: Goal) -> Trial | None:
        best: Trial | None = None
        for shards in self._shards():
            most = MOST_REPLICAS if best is None else size_of(best.cluster) - shards - 1
            found = self._fewest_replicas(goal, shards, most) if most > 0 else None
            best = found or best
        return best

    def _shards(self) -> Iterator[int]:
        """Numbers of shards to try: half as many again each time."""
        shards = self.cluster.shards
        while shards < self.most_shards:
            yield shards
            shards += max(1, shards // 2)
        yield self.most_shards

    def _fewest_replicas(self, goal: Goal, shards: int, most: int) -> Trial | None:
        """Doubles them until the goal is kept, then halves what is between."""
        if goal.lengths.output_tokens > 1 and self._least_step_s(goal, shards) > goal.per_token_s:
            return None
        below, replicas = 0, min(most, self._least_replicas(goal, shards))
        kept: Trial | None = None
        last: Trial | None = None
        while kept is None:
            trial = self.attempt(goal, replicas, shards)
            if trial.keeps(goal):
                kept = trial
            elif replicas >= most or (last is not None and not trial.is_faster_than(last)):
                return None  # more replicas wait longer for the shards
            else:
                last = None if trial.record.refused else trial
                below, replicas = replicas, min(most, 2 * replicas)
        while kept.cluster.replicas - below > 1:
            middle = (kept.cluster.replicas + below) // 2
            trial = self.attempt(goal, middle, shards)
            if trial.keeps(goal):
                kept = trial
            else:
                below = middle
        return kept

    def attempt(self, goal: Goal, replicas: int, shards: int) -> Trial:
        cluster = with_size(self.cluster, replicas, shards)
        answer_s = goal.first_token_s + goal.lengths.output_tokens * goal.per_token_s
        wanted = max(MIN_REQUESTS, round(goal.rate * max(MIN_S, LASTS * answer_s)))
        num_requests = min(wanted, MOST_REQUESTS)
        load = OpenLoad(goal.lengths, rate=goal.rate, num_requests=num_requests)
        record = Simulation(cluster, self.costs, load, to_first_refusal=True).run()
        return Trial(
            cluster=cluster,
            num_requests=num_requests,
            is_cut=num_requests < wanted,
            record=record,
            requests_s=record.requests_s,
            first_token_s=_percentiles(record.first_token_s),
            per_token_s=_percentiles(record.per_token_s) if goal.lengths.output_tokens > 1 else (0.0, 0.0),
        )

    def _least_step_s(self, goal: Goal, shards: int) -> float:
        """Of a lone sequence's step."""
        work = StepWork(rows=1, samples=1, context=goal.lengths.prompt_tokens)
        return StepTime.of(self.costs, work, shards, self.cluster.imbalance).alone

    def _least_replicas(self, goal: Goal, shards: int) -> int:
        """Fewer cannot do it, even with steps of all places: requests/s of one with a full batch."""
        lengths, limits = goal.lengths, self.cluster.limits
        tokens = lengths.prompt_tokens + lengths.output_tokens
        batch = max(1, min(limits.max_num_seqs, limits.cache_tokens // tokens))
        work = StepWork(rows=batch, samples=batch, context=batch * (lengths.prompt_tokens + lengths.output_tokens / 2))
        step_s = StepTime.of(self.costs, work, shards, self.cluster.imbalance).alone
        return max(1, int(goal.rate * lengths.output_tokens * step_s / batch))

    def _nearest(self, goal: Goal) -> Goal:
        """The goal with promises as good as an idle cluster can give: of a rate that leaves it idle, at most shards."""
        shards = self.most_shards
        trial = self.attempt(goal, min(MOST_REPLICAS, max(1, 4 * self._least_replicas(goal, shards))), shards)
        reached = replace(
            goal,
            first_token_s=max(goal.first_token_s, SLACK * trial.first_token_s[1]),
            per_token_s=max(goal.per_token_s, SLACK * trial.per_token_s[1]),
        )
        if trial.record.refused or self._best(reached) is None:
            raise SetupError(
                f"no cluster of up to {MOST_REPLICAS:,} attention replicas answers {goal.rate:g} requests/s of this "
                "length: ask for a lower --rate"
            )
        return reached


def with_size(cluster: ClusterModel, replicas: int, shards: int) -> ClusterModel:
    """Of a given size, on as many machines as it needs. cluster: on one."""
    sized = replace(cluster, replicas=replicas, shards=shards)
    if cluster.cores is None:
        return sized
    return replace(sized, cores=cluster.cores.times(num_machines(cluster.cores.num_cores, sized)))


def num_machines(num_cores: float, cluster: ClusterModel) -> int:
    """With so many cores each, one of them for each process."""
    return max(1, ceil(size_of(cluster) / num_cores))


def size_of(cluster: ClusterModel) -> int:
    """Processes that compute."""
    return cluster.replicas + cluster.shards


def _percentiles(seconds: list[float]) -> tuple[float, float]:
    after = seconds[int(WARM_UP * len(seconds)) :]
    if not after:
        return float("inf"), float("inf")
    median, high = np.percentile(after, (50, PERCENTILE))
    return float(median), float(high)
