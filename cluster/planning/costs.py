"""The costs of steps. Two sources have the same form: `roofline` works it out, `calibration` has measured it."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """A step of one engine. rows: its tokens.  samples: sequences that choose a token.  context: tokens whose keys and
    values are read, summed over its sequences."""

    rows: int
    samples: int
    context: float


class StepCosts(Protocol):
    """Seconds of each part of a step while nothing else runs, all layers together."""

    def attention_s(self, work: StepWork) -> float:
        """Of the attention replica: everything but the routed experts."""

    def shared_s(self, rows: int) -> float:
        """The part of it that is computed while the shards compute."""

    def shard_s(self, rows: int, num_shards: int, imbalance: float = 1.0) -> float:
        """Of the busiest shard. imbalance: its load over the mean."""

    def crossing_s(self, rows: int, num_shards: int) -> float:
        """From the attention replica to the shards and back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontCosts:
    """Ingress, HAProxy, Serve's replica and Ray: core seconds for a request, for each token of its prompt, for a step's
    message and for each token in it; cores that are busy without any load; and the seconds between a client and its
    engine, both ways."""

    request_s: float = 0.0
    prompt_token_s: float = 0.0
    step_s: float = 0.0
    token_s: float = 0.0
    background_cores: float = 0.0
    latency_s: float = 0.0

    def of_step(self, *, tokens: int, requests: int, prompt_tokens: int) -> float:
        """Core seconds that belong to one step."""
        of_requests = requests * self.request_s + prompt_tokens * self.prompt_token_s
        return self.step_s + tokens * self.token_s + of_requests


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """The parts of one step, in seconds."""

    attention: float
    shared: float
    shard: float
    crossing: float
    num_shards: int

    @classmethod
    def of(cls, costs: StepCosts, work: StepWork, num_shards: int, imbalance: float) -> "StepTime":
        """num_shards: 0 for a dense model."""
        if not num_shards:
            return cls(attention=costs.attention_s(work), shared=0.0, shard=0.0, crossing=0.0, num_shards=0)
        return cls(
            attention=costs.attention_s(work),
            shared=costs.shared_s(work.rows),
            shard=costs.shard_s(work.rows, num_shards, imbalance),
            crossing=costs.crossing_s(work.rows, num_shards),
            num_shards=num_shards,
        )

    @property
    def alone(self) -> float:
        """Of the step, on hardware that nothing else uses."""
        return self.attention + self.crossing + max(0.0, self.shard - self.shared)

    @property
    def core_seconds(self) -> float:
        """Of all its processes, where they compute on CPUs."""
        return self.attention + self.crossing + self.num_shards * self.shard
