"""Requests that arrive: so that a number of them is always under way, at random moments, or as a trace says."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(slots=True, eq=False)
class Request:
    """One request on its way. All moments are seconds of the simulation.

    uncomputed: tokens that are still to be computed before the next new one.  produced: new tokens that it has.
    turn: the lowest goes first among prompts.  began: its place among those that have begun, a new one each time.
    replayed: its replica died, and no queue refuses it.
    last_step: the number of its engine's step that ends it.
    """

    number: int
    arrived: float
    prompt_tokens: int
    output_tokens: int
    uncomputed: int = 0
    produced: int = 0
    turn: int = -1
    began: int = -1
    last_step: int = 0
    replayed: bool = False
    first_token: float | None = None
    ended: float | None = None

    def __post_init__(self) -> None:
        self.uncomputed = self.prompt_tokens


class Load(Protocol):
    """num_requests: in all."""

    num_requests: int

    def beginning(self) -> Iterator[Request]:
        """In the order of their arrivals."""

    def after(self, ended: Request, now: float) -> Request | None:
        """The request that follows an answer's end, if one does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Tokens of each request."""

    prompt_tokens: int
    output_tokens: int


class ClosedLoad:
    """So many at a time, each followed by the next."""

    def __init__(self, lengths: Lengths, *, concurrency: int, num_requests: int) -> None:
        self.num_requests = num_requests
        self._lengths, self._concurrency = lengths, min(concurrency, num_requests)
        self._next = 0

    def beginning(self) -> Iterator[Request]:
        for _ in range(self._concurrency):
            yield self._make(0.0)

    def after(self, ended: Request, now: float) -> Request | None:
        return self._make(now) if self._next < self.num_requests else None

    def _make(self, now: float) -> Request:
        self._next += 1
        return Request(self._next - 1, now, self._lengths.prompt_tokens, self._lengths.output_tokens)


class OpenLoad:
    """At random moments, whether earlier ones are through or not; the same moments for the same seed, as
    `moe-cluster bench serve --rate` sends them."""

    def __init__(self, lengths: Lengths, *, rate: float, num_requests: int, seed: int = 0) -> None:
        self.num_requests = num_requests
        self._lengths, self._rate, self._seed = lengths, rate, seed

    def beginning(self) -> Iterator[Request]:
        draw, now = random.Random(self._seed), 0.0
        for number in range(self.num_requests):
            yield Request(number, now, self._lengths.prompt_tokens, self._lengths.output_tokens)
            now += draw.expovariate(self._rate)

    def after(self, ended: Request, now: float) -> Request | None:
        return None


class TraceLoad:
    """arrivals: (seconds, prompt tokens, output tokens), in the order of the seconds."""

    def __init__(self, arrivals: Sequence[tuple[float, int, int]]) -> None:
        self.num_requests = len(arrivals)
        self.arrivals = arrivals

    def beginning(self) -> Iterator[Request]:
        for number, (at, prompt_tokens, output_tokens) in enumerate(self.arrivals):
            yield Request(number, at, prompt_tokens, output_tokens)

    def after(self, ended: Request, now: float) -> Request | None:
        return None
