"""`moe-cluster bench serve`: traffic for a running server over gRPC and HTTP, timed as its clients see it."""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Protocol

from cluster.bench.checkpoint import read_config
from cluster.bench.limits import MAX_PROMPT_TOKENS, RATES
from cluster.bench.machine import process_tree_bytes
from cluster.bench.report import markdown_table
from cluster.bench.sampling import SAMPLINGS
from cluster.bench.spec import SystemSpec
from cluster.bench.systems import check_shards
from cluster.bench.throughput import Workload
from cluster.bench.worker import RemoteSystem
from cluster.checkpoint.model_files import complete_directory
from cluster.client import options
from cluster.client.http_streams import HttpStreams
from cluster.config import ModelConfig
from cluster.drawing import bars
from cluster.errors import ClusterError, Overloaded, SetupError, Unavailable
from cluster.types import SamplingParams

_READY_S = 10.0
_MAX_THREADS = 1000  # streams of an open loop at a time
TURNS = 4  # of each front


class Piece(Protocol):
    """Of an answer."""

    @property
    def token_ids(self) -> Collection[int]: ...


Stream = Callable[[list[int], SamplingParams], Iterable[Piece]]


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamTiming:
    """One answer; all seconds count from its request.

    arrivals_s: of each token; several may come in one piece.  refused_s: of a refusal for want of room, else None.
    """

    arrivals_s: tuple[float, ...]
    error: str = ""
    refused_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficResult:
    """Milliseconds by percentile (50, 90, 99).

    gap: between two pieces of an answer.  whole: to its last token.
    refusal: to a refusal for want of room, which is no failure.
    server_bytes: the memory of the server's processes before and after.  http: of as many requests over HTTP.
    """

    requests: int
    failed: int
    refused: int
    tokens_per_s: float
    first_token_ms: tuple[float, float, float]
    gap_ms: tuple[float, float, float]
    per_token_ms: tuple[float, float, float]
    whole_ms: tuple[float, float, float]
    refusal_ms: tuple[float, float, float]
    errors: tuple[str, ...] = ()
    offline_tokens_per_s: float | None = None
    server_bytes: tuple[int, int] | None = None
    http: "TrafficResult | None" = None


def measure_server(args: argparse.Namespace) -> int:
    """Sends the requests, prints a table, returns 1 if a request failed. Raises SetupError, Unavailable."""
    for option, value in (
        ("--requests", args.requests), ("--concurrency", args.concurrency), ("--prompt-tokens", args.prompt_tokens),
        ("--output-tokens", args.output_tokens),
    ):  # fmt: skip
        if value < 1:
            raise SetupError(f"{option} is {value}, at least 1 is needed")
    if args.rate is not None and not RATES[0] <= args.rate <= RATES[1]:
        raise SetupError(f"--rate is {args.rate:g}, {RATES[0]:g} to {RATES[1]:g} requests/s are possible")
    num_tokens = args.requests * args.prompt_tokens
    if num_tokens > MAX_PROMPT_TOKENS:
        raise SetupError(
            f"--requests and --prompt-tokens make {num_tokens} tokens, {MAX_PROMPT_TOKENS} are possible: ask for fewer"
        )
    if args.offline is not None:
        offline = _offline_spec(args)
    http = (
        None
        if args.http is None
        else HttpStreams(args.http, key=options.api_key(args.api_key_file), adapter=args.adapter)
    )
    with options.connect(args, goes_on=False) as client:  # a break is a failure here
        if not client.is_serving(_READY_S):
            raise Unavailable(f"no server is ready at {args.address}: start one with `moe-cluster serve MODEL_DIR`")
        vocab_size = client.model_info().vocab_size
        fronts: list[Stream] = [client.stream, *([http.stream] if http is not None else [])]
        before = _server_bytes(args.server_pid)
        with bars() as progress:
            task = progress.add_task("requests", total=args.requests * len(fronts))
            result, *others = _in_turns(fronts, args, vocab_size, lambda: progress.update(task, advance=1))
    if others:
        result = replace(result, http=others[0])
    if args.server_pid is not None:
        result = replace(result, server_bytes=(before, _server_bytes(args.server_pid)))
    if args.offline is not None:
        result = replace(result, offline_tokens_per_s=_measure_offline(*offline, args))
    _print(result, args)
    if args.json:
        args.json.write_text(json.dumps(asdict(result), indent=2) + "\n")
    return 1 if result.failed or (result.http is not None and result.http.failed) else 0


def summarize(timings: list[StreamTiming], took_s: float) -> TrafficResult:
    """took_s: from the first request to the last answer's end."""
    good = [timing for timing in timings if not timing.error and timing.refused_s is None]
    refused = [timing.refused_s for timing in timings if timing.refused_s is not None]
    gaps = [b - a for t in good for a, b in zip(t.arrivals_s, t.arrivals_s[1:], strict=False) if b > a]
    per_token = [(t.arrivals_s[-1] - t.arrivals_s[0]) / (len(t.arrivals_s) - 1) for t in good if len(t.arrivals_s) > 1]
    return TrafficResult(
        requests=len(timings),
        failed=len(timings) - len(good) - len(refused),
        refused=len(refused),
        tokens_per_s=sum(len(t.arrivals_s) for t in good) / took_s,
        first_token_ms=percentiles([t.arrivals_s[0] for t in good]),
        gap_ms=percentiles(gaps),
        per_token_ms=percentiles(per_token),
        whole_ms=percentiles([t.arrivals_s[-1] for t in good]),
        refusal_ms=percentiles(refused),
        errors=tuple(sorted({t.error for t in timings if t.error})),
    )


def _in_turns(
    fronts: Sequence[Stream], args: argparse.Namespace, vocab_size: int, advance: Callable[[], None]
) -> list[TrafficResult]:
    """Measures each front with prompts of its own, so that none finds the other's in the cache. Several take turns with
    parts of their requests: so the machine's moods meet all of them."""
    prompts = draw_prompts(args, vocab_size, len(fronts) * args.requests)
    num_turns = min(TURNS, args.requests) if len(fronts) > 1 else 1
    timings: list[list[StreamTiming]] = [[] for _ in fronts]
    took_s = [0.0] * len(fronts)
    for turn in range(num_turns):
        for index, front in enumerate(fronts):
            part = prompts[index * args.requests : (index + 1) * args.requests][turn::num_turns]
            started = time.perf_counter()
            timings[index] += run_load(front, args, part, advance)
            took_s[index] += time.perf_counter() - started
    return [summarize(found, seconds) for found, seconds in zip(timings, took_s, strict=True)]


def run_load(
    front: Stream, args: argparse.Namespace, prompts: Sequence[list[int]], advance: Callable[[], None]
) -> list[StreamTiming]:
    draw = random.Random(args.seed)
    params = SAMPLINGS[args.sampling].params(len(prompts), args.output_tokens)

    def ask(place: int) -> StreamTiming:
        timing = _time_stream(front, prompts[place], params[place])
        advance()
        return timing

    if args.rate is None:
        with ThreadPoolExecutor(args.concurrency) as pool:
            return list(pool.map(ask, range(len(prompts))))
    with ThreadPoolExecutor(min(args.requests, _MAX_THREADS)) as pool:
        asked = []
        for place in range(len(prompts)):
            asked.append(pool.submit(ask, place))
            time.sleep(draw.expovariate(args.rate))
        return [one.result() for one in asked]


def _server_bytes(pid: int | None) -> int:
    """Raises SetupError."""
    if pid is None:
        return 0
    try:
        return process_tree_bytes(pid)[1]
    except ProcessLookupError as error:
        raise SetupError(f"--server-pid {pid}: {error}") from error


def _offline_spec(args: argparse.Namespace) -> tuple[SystemSpec, ModelConfig]:
    """Raises CheckpointError, SetupError."""
    model_dir = complete_directory(args.offline)
    config = read_config(model_dir)
    check_shards(args.shards, config)
    return SystemSpec(kind="stream", model_dir=model_dir, dtype=config.dtype, num_shards=args.shards), config


def _measure_offline(spec: SystemSpec, config: ModelConfig, args: argparse.Namespace) -> float:
    """Tokens/s of the same requests without a server: `LLM.generate` over as many sequences at a time."""
    workload = Workload(
        batches=(args.concurrency,),
        prompt_tokens=args.prompt_tokens,
        output_tokens=max(2, args.output_tokens),
        repeats=1,
        vocab_size=config.vocab_size,
    )
    system = RemoteSystem(spec, config, workload)
    try:
        system.generate(workload.prompts(args.concurrency, 0), 2)
        started = time.perf_counter()
        prompts = draw_prompts(args, config.vocab_size, args.requests)
        counts = system.generate(prompts, args.output_tokens, SAMPLINGS[args.sampling])
        return sum(counts) / (time.perf_counter() - started)
    finally:
        system.close()


def draw_prompts(args: argparse.Namespace, vocab_size: int, number: int) -> list[list[int]]:
    draw = random.Random(args.seed)
    return [[draw.randrange(vocab_size) for _ in range(args.prompt_tokens)] for _ in range(number)]


def _time_stream(front: Stream, prompt: list[int], params: SamplingParams) -> StreamTiming:
    started = time.perf_counter()
    arrivals: list[float] = []
    try:
        for piece in front(prompt, params):
            arrivals += [time.perf_counter() - started] * len(piece.token_ids)
    except Overloaded:
        return StreamTiming(arrivals_s=(), refused_s=time.perf_counter() - started)
    except ClusterError as error:
        return StreamTiming(arrivals_s=tuple(arrivals), error=str(error))
    return StreamTiming(arrivals_s=tuple(arrivals), error="" if arrivals else "an answer without a token")


def percentiles(seconds: list[float]) -> tuple[float, float, float]:
    """Of 50, 90 and 99, in milliseconds; nan without a value."""
    if len(seconds) < 2:
        value = 1000 * seconds[0] if seconds else float("nan")
        return value, value, value
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return 1000 * cuts[49], 1000 * cuts[89], 1000 * cuts[98]


def _print(result: TrafficResult, args: argparse.Namespace) -> None:
    loop = f"{args.concurrency} streams at a time" if args.rate is None else f"{args.rate:g} requests/s"
    print(
        f"{result.requests} requests of {args.prompt_tokens} prompt and {args.output_tokens} output tokens, "
        f"{SAMPLINGS[args.sampling].describe()}, {loop}: "
        f"{result.tokens_per_s:.1f} tokens/s, {result.failed} failed, {result.refused} refused\n"
    )
    if result.offline_tokens_per_s is not None:
        ratio = result.tokens_per_s / result.offline_tokens_per_s
        print(f"Offline, the same requests: {result.offline_tokens_per_s:.1f} tokens/s; served / offline {ratio:.2f}\n")
    if result.server_bytes is not None:
        num_processes, _ = process_tree_bytes(args.server_pid)
        first, last = (value / 2**20 for value in result.server_bytes)
        print(f"The server's {num_processes} processes: {first:.0f} MiB before, {last:.0f} MiB after\n")
    if result.http is not None:
        ratio = result.http.tokens_per_s / result.tokens_per_s
        print(
            f"HTTP, as many other requests, in turns: {result.http.tokens_per_s:.1f} tokens/s, "
            f"{result.http.failed} failed, {result.http.refused} refused; HTTP / gRPC {ratio:.2f}\n"
        )
    rows: list[tuple[str, ...]] = [("milliseconds", "50 %", "90 %", "99 %"), *_rows(result)]
    if result.http is not None:
        rows += [(f"HTTP: {name}", *values) for name, *values in _rows(result.http)]
    print("\n".join(markdown_table(rows)))
    for error in (*result.errors, *(result.http.errors if result.http is not None else ())):
        print(f"- FAILED: {error}")


def _rows(result: TrafficResult) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, values in (
        ("first token", result.first_token_ms), ("between pieces", result.gap_ms), ("for a token", result.per_token_ms),
        ("whole answer", result.whole_ms), ("refusal", result.refusal_ms),
    ):  # fmt: skip
        if name == "refusal" and not result.refused:
            continue
        rows.append((name, *(f"{value:.1f}" for value in values)))
    return rows
