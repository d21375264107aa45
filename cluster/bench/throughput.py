"""Times prefill and decode apart, repeats and sums up. Knows no model: it times a `System`.

A run generates one token (t_1: all of it prefill) and then M tokens (t_M). With B prompts of P tokens,
prefill is B · P / t_1 and decode B · (M − 1) / (t_M − t_1) tokens/s.
"""

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.errors import ClusterError, SetupError

Prompts = list[list[int]]


class System(Protocol):
    """A system to measure: greedy generation that EOS does not stop."""

    @property
    def detail(self) -> str:
        """How it computes (device, threads, kernels), for the report."""

    def generate(self, prompts: Prompts, num_tokens: int) -> list[int]:
        """Blocks until every prompt has its tokens; returns how many each got."""

    def close(self) -> None:
        """Gives back its memory and processes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The work of every system: the same prompts, drawn from `seed`. batches: ascending."""

    batches: tuple[int, ...]
    prompt_tokens: int
    output_tokens: int
    repeats: int
    vocab_size: int
    seed: int = 0

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
        return len(self.batches) * (1 + self.repeats)

    def prompts(self, batch: int, run_id: int) -> Prompts:
        """Random token ids, others for each run, so that no system can reuse an earlier run."""
        draw = random.Random(f"{self.seed}/{batch}/{run_id}")
        return [[draw.randrange(self.vocab_size) for _ in range(self.prompt_tokens)] for _ in range(batch)]


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
    """One system at one batch size, in tokens/s."""

    batch: int
    prefill: Spread
    decode: Spread


def measure(
    system: System, workload: Workload, clock: Callable[[], float], advance: Callable[[int], None]
) -> tuple[Point, ...]:
    """Runs the whole workload on one system: for each batch size a warm-up, then the repeats.

    clock: seconds.  advance: called with the batch size after each run, warm-ups too.
    Raises ClusterError when the system generates another number of tokens than asked for, SetupError when
    decode is too short to time.
    """
    points = []
    for batch in workload.batches:
        timings = []
        for run_id in range(1 + workload.repeats):
            timing = _time_run(system, workload, batch, run_id, clock)
            if run_id > 0:
                timings.append(timing)
            advance(batch)
        points.append(summarize(timings, workload, batch))
    return tuple(points)


def measure_in_turns(
    systems: Sequence[System],
    workload: Workload,
    clock: Callable[[], float],
    advance: Callable[[System, int], None],
    rest: Callable[[], None],
) -> dict[int, tuple[Point, ...] | ClusterError]:
    """As `measure`, each run by all systems one after another: if the machine's speed wanders, it wanders for all.

    rest: called before each run.  Returns each system's points, or the error that left it without, by its place in
    `systems`.
    """
    timings: dict[tuple[int, int], list[Timing]] = {}
    found: dict[int, tuple[Point, ...] | ClusterError] = {}
    for batch in workload.batches:
        for run_id in range(1 + workload.repeats):
            for place, system in enumerate(systems):
                if place in found:
                    continue
                rest()
                try:
                    timing = _time_run(system, workload, batch, run_id, clock)
                except ClusterError as error:
                    found[place] = error
                    continue
                if run_id > 0:
                    timings.setdefault((place, batch), []).append(timing)
                advance(system, batch)
    for place in range(len(systems)):
        if place not in found:
            try:
                found[place] = tuple(summarize(timings[place, batch], workload, batch) for batch in workload.batches)
            except SetupError as error:
                found[place] = error
    return found


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


def _time_run(system: System, workload: Workload, batch: int, run_id: int, clock: Callable[[], float]) -> Timing:
    seconds = []
    for part, num_tokens in enumerate((1, workload.output_tokens)):
        prompts = workload.prompts(batch, 2 * run_id + part)
        started = clock()
        generated = system.generate(prompts, num_tokens)
        seconds.append(clock() - started)
        if generated != [num_tokens] * batch:
            raise ClusterError(
                f"{num_tokens} tokens for each of {batch} prompts were asked for, {generated} came: "
                "nothing was measured"
            )
    return Timing(seconds[0], seconds[1])
