"""`moe-cluster bench context`: tokens/s and memory of one sequence against the length of its context, on a tiny model.

Each length is measured in a process of its own, so that its peak of memory is its own.
"""

import argparse
import json
import multiprocessing
import random
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, TextColumn, TimeElapsedColumn

from cluster.bench.machine import this_machine
from cluster.bench.report import describe_machine, markdown_table
from cluster.checkpoint.made.synthetic import write_checkpoint
from cluster.config import read_model_config
from cluster.drawing import bars
from cluster.errors import ClusterError, SetupError

TINY: dict[str, Any] = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 512, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "torch_dtype": "float32", "eos_token_id": 1,
    "tie_word_embeddings": True,
}  # fmt: skip
OUTPUT_TOKENS = 17  # 16 decode steps after the first token


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextPoint:
    """cache_bytes: that the sequence needs.  first_chunk_bytes, peak_bytes: of the process, behind the prompt's first
    chunk, when the cache and all that does not depend on the prompt's length have been taken, and at most."""

    context: int
    prefill_tokens_s: float
    decode_ms: float
    cache_bytes: int
    first_chunk_bytes: int
    peak_bytes: int


def measure_context(args: argparse.Namespace) -> int:
    """Measures, prints a table. Raises SetupError, ClusterError."""
    for option, values in (("context", args.context), ("chunk", (args.chunk,))):
        if min(values) < 1:
            raise SetupError(f"--{option} has {min(values)}, numbers from 1 are needed")
    if args.window is not None and args.window < 1:
        raise SetupError(f"--window is {args.window}, a number from 1 is needed")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    points = []
    with bars(*columns) as progress:
        task = progress.add_task("contexts", total=sum(args.context))
        for context in args.context:
            progress.update(task, description=f"{context:,} tokens")
            try:
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                    points.append(pool.submit(measure_one, context, args.window, args.chunk).result())
            except BrokenProcessPool as error:
                raise ClusterError(
                    f"a context of {context} tokens: its process was ended, most likely for want of memory; ask for "
                    "fewer tokens"
                ) from error
            progress.update(task, advance=context)
    config = read_model_config(_raw(max(args.context), args.window))
    slides = f", layers that see {args.window:,} tokens" if args.window else ""
    print(f"{describe_machine(this_machine())}\n")
    print(
        f"Model: {config.num_hidden_layers} dense layers, hidden {config.hidden_size}, {config.num_attention_heads} "
        f"heads on {config.num_key_value_heads}, float32{slides}; one prompt in chunks of {args.chunk:,} tokens.\n"
    )
    print("\n".join(markdown_table(_rows(points))))
    if args.json:
        args.json.write_text(json.dumps([asdict(point) for point in points], indent=2) + "\n")
    return 0


def measure_one(context: int, window: int | None, chunk: int) -> ContextPoint:
    """Measures in this process."""
    from cluster.llm import LLM
    from cluster.types import SamplingParams

    config = read_model_config(_raw(context, window))
    num_tokens = context if window is None else min(context, window + chunk)
    cache_bytes = (num_tokens + OUTPUT_TOKENS) * config.kv_bytes_per_token("float32")
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder) / "model", _raw(context, window), seed=0)
        llm = LLM(
            Path(folder) / "model", dtype="float32", device="cpu", skip_tokenizer=True, max_num_seqs=1,
            max_num_batched_tokens=chunk, kv_cache_bytes=cache_bytes + (1 << 16),
        )  # fmt: skip
    draw = random.Random(0)
    prompt = [draw.randrange(2, config.vocab_size) for _ in range(context)]
    ends: list[float] = []
    sizes: list[int] = []
    run = llm.engine.runner.run

    def watched(batch: Any) -> Any:
        result = run(batch)
        ends.append(time.perf_counter())
        sizes.append(resident_bytes())
        return result

    llm.engine.runner.run = watched  # type: ignore[method-assign]
    started = time.perf_counter()
    llm.generate([prompt], SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True))
    first = len(ends) - OUTPUT_TOKENS  # the step that brought the first token
    return ContextPoint(
        context=context,
        prefill_tokens_s=context / (ends[first] - started),
        decode_ms=1000 * (ends[-1] - ends[first]) / (OUTPUT_TOKENS - 1),
        cache_bytes=cache_bytes,
        first_chunk_bytes=sizes[0],
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def resident_bytes() -> int:
    """Of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _raw(context: int, window: int | None) -> dict[str, Any]:
    slides = {} if window is None else {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0}
    return {**TINY, "max_position_embeddings": context + OUTPUT_TOKENS, **slides}


def _rows(points: list[ContextPoint]) -> list[tuple[str, ...]]:
    head = (
        "context",
        "prefill, tokens/s",
        "decode step, ms",
        "cache, MB",
        "first chunk, MB",
        "peak, MB",
        "difference",
    )
    rows: list[tuple[str, ...]] = [head]
    for p in points:
        sizes = (p.cache_bytes, p.first_chunk_bytes, p.peak_bytes, p.peak_bytes - p.first_chunk_bytes)
        shown = (f"{size / 1e6:,.0f}" for size in sizes)
        rows.append((f"{p.context:,}", f"{p.prefill_tokens_s:,.0f}", f"{p.decode_ms:.2f}", *shown))
    return rows
