"""Times an engine's steps in a process of its own, on one thread, the routed experts' part apart."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cluster.config import ModelConfig
from cluster.engine.step import Batch
from cluster.experts.transport import LocalTransport
from cluster.llm import LLM
from cluster.planning.costs import StepWork
from cluster.types import SamplingParams

SHORT_PROMPT = 16
DECODE_STEPS = 6
REPEATS = 3  # of each prompt
BATCHES = (1, 2, 4, 8, 16, 32)
PROMPTS = (16, 64, 256, 1024)
LONG_CONTEXT_BATCH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPoint:
    """One step. total_s: all of it, expert_s: of the routed experts, shared_s: of the shared ones."""

    work: StepWork
    total_s: float
    expert_s: float
    shared_s: float


@dataclass(slots=True)
class _Clocks:
    expert_s: float = 0.0
    shared_s: float = 0.0
    points: list[StepPoint] = field(default_factory=list)


def time_steps(model_dir: Path, dtype: str, kv_cache_bytes: int) -> list[StepPoint]:
    """Runs in a fresh process. Decode steps of BATCHES, prompts of PROMPTS, and decode steps of a long context."""
    torch.set_num_threads(1)
    llm = LLM(
        model_dir, dtype=dtype, device="cpu", skip_tokenizer=True, enable_prefix_caching=False,
        kv_cache_bytes=kv_cache_bytes, max_num_seqs=BATCHES[-1], max_num_batched_tokens=PROMPTS[-1],
    )  # fmt: skip
    draw = random.Random(0)

    def ask(number: int, prompt_tokens: int, output_tokens: int) -> None:
        prompts = [[draw.randrange(2, llm.info.vocab_size) for _ in range(prompt_tokens)] for _ in range(number)]
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True))

    ask(1, SHORT_PROMPT, 2)
    with llm, _watched(llm) as clocks:
        for prompt_tokens in PROMPTS:
            for _ in range(REPEATS):
                ask(1, prompt_tokens, 1)
        for batch in BATCHES:
            ask(batch, SHORT_PROMPT, 1 + DECODE_STEPS)
        # Each prompt takes a step of its own: when the last one is through, all are still there.
        ask(LONG_CONTEXT_BATCH, PROMPTS[-1] - LONG_CONTEXT_BATCH, LONG_CONTEXT_BATCH + DECODE_STEPS)
    return clocks.points


def cache_bytes(config: ModelConfig, dtype: str) -> int:
    """That `time_steps` needs."""
    return (LONG_CONTEXT_BATCH + 1) * (PROMPTS[-1] + 2 * SHORT_PROMPT) * config.kv_bytes_per_token(dtype)


@contextmanager
def _watched(llm: LLM) -> Iterator[_Clocks]:
    """Times the steps while it is open."""
    clocks = _Clocks()
    runner: Any = llm.engine.runner
    transport = llm.experts.transport
    if isinstance(transport, LocalTransport):
        for shard in transport.shards.values():
            _time_calls(shard, "forward", lambda seconds: _add(clocks, "expert_s", seconds))
    for name, module in runner.model.named_modules():
        if name.endswith(".shared_expert"):
            _time_calls(module, "forward", lambda seconds: _add(clocks, "shared_s", seconds))
    run = runner.run

    def timed(batch: Batch) -> Any:
        clocks.expert_s = clocks.shared_s = 0.0
        work = _work(batch)
        started = time.perf_counter()
        result = run(batch)
        total_s = time.perf_counter() - started
        point = StepPoint(work=work, total_s=total_s, expert_s=clocks.expert_s, shared_s=clocks.shared_s)
        clocks.points.append(point)
        return result

    runner.run = timed
    try:
        yield clocks
    finally:
        runner.run = run


def _time_calls(owner: Any, name: str, took: Callable[[float], None]) -> None:
    call = getattr(owner, name)

    def timed(*args: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return call(*args, **options)
        finally:
            took(time.perf_counter() - started)

    setattr(owner, name, timed)


def _add(clocks: _Clocks, name: str, seconds: float) -> None:
    setattr(clocks, name, getattr(clocks, name) + seconds)


def _work(batch: Batch) -> StepWork:
    """context: tokens that are in the cache before the step."""
    return StepWork(
        rows=batch.num_rows,
        samples=sum(s.samples for s in batch.scheduled),
        context=sum(s.sequence.num_computed_tokens for s in batch.scheduled),
    )
