"""Times prefill and decode apart, repeats and sums up. Knows no model: it times a `System`.

A run generates one token (t_1: all of it prefill) and then M tokens (t_M). With B prompts of P tokens,
prefill is B · P / t_1 and decode B · (M − 1) / (t_M − t_1) tokens/s.
"""

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from cluster.bench.sampling import GREEDY, Sampling
from cluster.errors import ClusterError, SetupError

Prompts = list[list[int]]


class System(Protocol):
    """A system to measure: generation that EOS does not stop."""

    @property
    def detail(self) -> str:
        """How it computes (device, threads, kernels), for the report."""

    def generate(self, prompts: Prompts, num_tokens: int, sampling: Sampling = GREEDY) -> list[int]:
        """Blocks until every prompt has its tokens; returns how many each got. Each prompt's seed is its place."""

    def close(self) -> None:
        """Gives back its memory and processes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The work of every system: the same prompts, drawn from `seed`, and the same ways to choose tokens.

    batches: ascending.
    """

    batches: tuple[int, ...]
    prompt_tokens: int
    output_tokens: int
    repeats: int
    vocab_size: int
    seed: int = 0
    samplings: tuple[Sampling, ...] = (GREEDY,)

    def __post_init__(self) -> None:
        if not self.batches or list(self.batches) != sorted(set(self.batches)) or self.batches[0] < 1:
            raise SetupError(f"--batch is {self.batches}, different numbers from 1 in ascending order are needed")
        for option, value, low in (
            ("--prompt-tokens", self.prompt_tokens, 1),
            ("--output-tokens", self.output_tokens, 2),
            ("--repeat", self.repeats, 1),
        ):
            if value < low:
                raise SetupError(f"{option} is {value}, at least {low} is needed")

    @property
    def num_runs(self) -> int:
        """Runs of one system, warm-ups included."""
        return len(self.batches) * (1 + self.repeats) * len(self.samplings)

    def runs(self) -> list["Run"]:
        """In their order: the samplings take turns, so that a machine whose speed wanders does so for all of them."""
        return [
            Run(batch=batch, repeat=repeat, sampling=sampling, prompts_id=repeat * len(self.samplings) + place)
            for batch in self.batches
            for repeat in range(1 + self.repeats)
            for place, sampling in enumerate(self.samplings)
        ]

    def prompts(self, batch: int, run_id: int) -> Prompts:
        """Random token ids, others for each run, so that no system can reuse an earlier run."""
        draw = random.Random(f"{self.seed}/{batch}/{run_id}")
        return [[draw.randrange(self.vocab_size) for _ in range(self.prompt_tokens)] for _ in range(batch)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One timed generation. repeat: 0 warms up.  prompts_id: of its prompts, which no other run has."""

    batch: int
    repeat: int
    sampling: Sampling
    prompts_id: int

    @property
    def name(self) -> str:
        return f"batch {self.batch}, {self.sampling.name}"


@dataclass(frozen=True, slots=True)
class Timing:
    """One run's seconds: until one token a prompt, and until all of them."""

    prefill_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Spread:
    """Tokens/s over the repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))

    def inverse(self, scale: float) -> "Spread":
        """scale divided by each value; the lowest stays the lowest."""
        return Spread(scale / self.median, scale / self.high, scale / self.low)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One system at one batch size, in tokens/s. sampling: its name."""

    batch: int
    prefill: Spread
    decode: Spread
    sampling: str = GREEDY.name


def measure(
    system: System, workload: Workload, clock: Callable[[], float], advance: Callable[[Run], None]
) -> tuple[Point, ...]:
    """Makes all runs on one system: for each batch size a warm-up, then the repeats.

    clock: seconds.  advance: called after each run, warm-ups too.
    Raises ClusterError when the system generates another number of tokens than asked for, SetupError when
    decode is too short to time.
    """
    timings: _Timings = {}
    for run in workload.runs():
        _take(timings, run, _time_run(system, workload, run, clock))
        advance(run)
    return _points(timings, workload)


def measure_in_turns(
    systems: Sequence[System],
    workload: Workload,
    clock: Callable[[], float],
    advance: Callable[[System, Run], None],
    rest: Callable[[], None],
) -> dict[int, tuple[Point, ...] | ClusterError]:
    """As `measure`, each run by all systems one after another: if the machine's speed wanders, it wanders for all.

    rest: called before each run.  Returns each system's points, or the error that left it without, by its place in
    `systems`.
    """
    timings: list[_Timings] = [{} for _ in systems]
    found: dict[int, tuple[Point, ...] | ClusterError] = {}
    for run in workload.runs():
        for place, system in enumerate(systems):
            if place in found:
                continue
            rest()
            try:
                _take(timings[place], run, _time_run(system, workload, run, clock))
            except ClusterError as error:
                found[place] = error
                continue
            advance(system, run)
    for place in range(len(systems)):
        if place not in found:
            try:
                found[place] = _points(timings[place], workload)
            except SetupError as error:
                found[place] = error
    return found


_Timings = dict[tuple[int, str], list[Timing]]  # of each batch size and sampling


def _take(timings: _Timings, run: Run, timing: Timing) -> None:
    if run.repeat > 0:
        timings.setdefault((run.batch, run.sampling.name), []).append(timing)


def _points(timings: _Timings, workload: Workload) -> tuple[Point, ...]:
    return tuple(
        replace(summarize(repeats, workload, batch), sampling=sampling)
        for (batch, sampling), repeats in timings.items()
    )


def summarize(timings: Sequence[Timing], workload: Workload, batch: int) -> Point:
    """Turns the repeats' seconds into tokens/s. Raises SetupError when decode is too short to time."""
    prefill, decode = [], []
    for timing in timings:
        decode_s = timing.total_s - timing.prefill_s
        if decode_s <= 0:
            raise SetupError(
                f"at batch {batch} {workload.output_tokens} tokens took no longer than one: raise --output-tokens"
            )
        prefill.append(batch * workload.prompt_tokens / timing.prefill_s)
        decode.append(batch * (workload.output_tokens - 1) / decode_s)
    return Point(batch=batch, prefill=Spread.of(prefill), decode=Spread.of(decode))


def _time_run(system: System, workload: Workload, run: Run, clock: Callable[[], float]) -> Timing:
    seconds = []
    for part, num_tokens in enumerate((1, workload.output_tokens)):
        prompts = workload.prompts(run.batch, 2 * run.prompts_id + part)
        started = clock()
        generated = system.generate(prompts, num_tokens, run.sampling)
        seconds.append(clock() - started)
        if generated != [num_tokens] * run.batch:
            raise ClusterError(
                f"{num_tokens} tokens for each of {run.batch} prompts were asked for, {generated} came: "
                "nothing was measured"
            )
    return Timing(seconds[0], seconds[1])
