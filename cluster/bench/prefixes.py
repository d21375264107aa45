"""`moe-cluster bench prefixes`: prompts that begin alike, for running servers in turns: how much of them was in the
caches, and what clients waited for the first token."""

import argparse
import json
import random
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Protocol

from cluster.bench.limits import MAX_PROMPT_TOKENS
from cluster.bench.report import markdown_table
from cluster.bench.traffic import percentiles
from cluster.client import options
from cluster.drawing import bars
from cluster.errors import ClusterError, SetupError, Unavailable
from cluster.types import SamplingParams

READY_S = 10.0

Conversation = Sequence[list[int]]  # the new tokens of each turn


class Piece(Protocol):
    """Of an answer."""

    @property
    def token_ids(self) -> Sequence[int]: ...

    @property
    def usage(self) -> "Usage": ...


class Usage(Protocol):
    """In the last piece; before, 0."""

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def cached_tokens(self) -> int: ...


Stream = Callable[[list[int], SamplingParams], Iterable[Piece]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One request. first_token_s: from the request's start."""

    first_token_s: float = 0.0
    num_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixResult:
    """One load at one server. hit_rate: the share of the prompts' tokens that was in a cache.

    first_token_ms: by percentile (50, 90, 99).
    """

    load: str
    address: str
    requests: int
    failed: int
    hit_rate: float
    first_token_ms: tuple[float, float, float]
    tokens_per_s: float
    errors: tuple[str, ...] = ()


def measure_prefixes(args: argparse.Namespace) -> int:
    """Sends the loads, prints a table, returns 1 if a request failed. Raises SetupError, Unavailable."""
    _check(args)
    addresses = list(dict.fromkeys((args.address, *args.against)))
    with ExitStack() as stack:
        clients = [
            stack.enter_context(
                options.connect(argparse.Namespace(**{**vars(args), "address": address}), goes_on=False)
            )
            for address in addresses
        ]
        for client, address in zip(clients, addresses, strict=True):
            if not client.is_serving(READY_S):
                raise Unavailable(f"no server is ready at {address}: start one with `moe-cluster serve MODEL`")
        infos = [client.model_info() for client in clients]
        _check_context(args, min(info.max_model_len for info in infos))
        vocab_size = min(info.vocab_size for info in infos)
        streams = dict(zip(addresses, (client.stream for client in clients), strict=True))
        num_requests = len(args.loads) * len(streams) * args.repeat * args.conversations * args.turns
        with bars() as progress:
            task = progress.add_task("requests", total=num_requests)
            results = measure(streams, args, vocab_size, lambda: progress.update(task, advance=1))
    _print(results, args)
    if args.json:
        args.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    return 1 if any(result.failed for result in results) else 0


def measure(
    streams: dict[str, Stream],
    args: argparse.Namespace,
    vocab_size: int,
    advance: Callable[[], None],
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> list[PrefixResult]:
    """Gives each server each load, `args.repeat` times in turns, each time with tokens that none has seen.

    streams: by the server's address.
    """
    draw, results = random.Random(args.seed), []
    for load in args.loads:
        turns: dict[str, list[Turn]] = {address: [] for address in streams}
        took_s = dict.fromkeys(streams, 0.0)
        for _ in range(args.repeat):
            for address, stream in streams.items():
                conversations = drawn(load, args, vocab_size, draw)
                started = clock()
                turns[address] += _run(stream, conversations, args, advance, clock)
                took_s[address] += clock() - started
        results += [summarize(load, address, turns[address], took_s[address]) for address in streams]
    return results


def drawn(load: str, args: argparse.Namespace, vocab_size: int, draw: random.Random) -> list[Conversation]:
    """Returns as many requests for each load: `turns`, conversations that go on with their answers; `shared`,
    questions of one turn that begin with one of `args.systems` texts."""

    def tokens(num: int) -> list[int]:
        return [draw.randrange(vocab_size) for _ in range(num)]

    if load == "turns":
        return [[tokens(args.prompt_tokens) for _ in range(args.turns)] for _ in range(args.conversations)]
    systems = [tokens(args.system_tokens) for _ in range(args.systems)]
    num_questions = args.conversations * args.turns
    return [[[*draw.choice(systems), *tokens(args.prompt_tokens)]] for _ in range(num_questions)]


def summarize(load: str, address: str, turns: Sequence[Turn], took_s: float) -> PrefixResult:
    """took_s: from the first request to the last answer's end."""
    good = [turn for turn in turns if not turn.error]
    return PrefixResult(
        load=load,
        address=address,
        requests=len(turns),
        failed=len(turns) - len(good),
        hit_rate=sum(turn.cached_tokens for turn in good) / max(1, sum(turn.prompt_tokens for turn in good)),
        first_token_ms=percentiles([turn.first_token_s for turn in good]),
        tokens_per_s=sum(turn.num_tokens for turn in good) / took_s,
        errors=tuple(sorted({turn.error for turn in turns if turn.error})),
    )


def _run(
    stream: Stream,
    conversations: Sequence[Conversation],
    args: argparse.Namespace,
    advance: Callable[[], None],
    clock: Callable[[], float],
) -> list[Turn]:
    """A closed loop: args.concurrency conversations at a time, each followed by the next."""
    params = SamplingParams(temperature=0.0, max_tokens=args.output_tokens, ignore_eos=True)

    def talk(conversation: Conversation) -> list[Turn]:
        prompt: list[int] = []
        turns: list[Turn] = []
        for new in conversation:
            prompt += new
            turns.append(_ask(stream, prompt, params, clock))
            advance()
        return turns

    with ThreadPoolExecutor(args.concurrency) as pool:
        return [turn for turns in pool.map(talk, conversations) for turn in turns]


def _ask(stream: Stream, prompt: list[int], params: SamplingParams, clock: Callable[[], float]) -> Turn:
    """One turn; its answer is added to the prompt."""
    started, first_token_s = clock(), None
    answer: list[int] = []
    num_prompt_tokens = num_cached_tokens = 0
    try:
        for piece in stream(list(prompt), params):
            if piece.token_ids and first_token_s is None:
                first_token_s = clock() - started
            answer += piece.token_ids
            num_prompt_tokens, num_cached_tokens = piece.usage.prompt_tokens, piece.usage.cached_tokens
    except ClusterError as error:
        return Turn(error=str(error))
    if first_token_s is None:
        return Turn(error="an answer without a token")
    prompt += answer
    return Turn(
        first_token_s=first_token_s,
        num_tokens=len(answer),
        prompt_tokens=num_prompt_tokens,
        cached_tokens=num_cached_tokens,
    )


def _check(args: argparse.Namespace) -> None:
    """Raises SetupError."""
    for name in ("conversations", "turns", "concurrency", "systems", "prompt_tokens", "output_tokens", "repeat"):
        if getattr(args, name) < 1:
            raise SetupError(f"--{name.replace('_', '-')} is {getattr(args, name)}, at least 1 is needed")
    if args.system_tokens < 0:
        raise SetupError(f"--system-tokens is {args.system_tokens}, at least 0 is needed")
    for address in args.against:
        options.check_address(address)
    num_tokens = args.conversations * args.turns * (args.system_tokens + args.prompt_tokens)
    if num_tokens > MAX_PROMPT_TOKENS:
        raise SetupError(
            f"--conversations, --turns, --system-tokens and --prompt-tokens make {num_tokens} tokens, "
            f"{MAX_PROMPT_TOKENS} are possible: ask for fewer"
        )


def _check_context(args: argparse.Namespace, max_model_len: int) -> None:
    """Raises SetupError where the longest prompt and its answer are longer than a server's context."""
    each = args.prompt_tokens + args.output_tokens
    longest = max({"turns": args.turns * each, "shared": args.system_tokens + each}[load] for load in args.loads)
    if longest > max_model_len:
        raise SetupError(f"the longest prompt and answer have {longest} tokens, the context has {max_model_len}")


def _print(results: Sequence[PrefixResult], args: argparse.Namespace) -> None:
    rows: list[tuple[str, ...]] = [
        ("load", "server", "requests", "hit rate", "first token, ms: 50 %", "90 %", "99 %", "tokens/s", "failed")
    ]
    for result in results:
        rows.append(
            (
                result.load, result.address, str(result.requests), f"{100 * result.hit_rate:.1f} %",
                *(f"{value:.1f}" for value in result.first_token_ms), f"{result.tokens_per_s:.1f}", str(result.failed),
            )
        )  # fmt: skip
    print(
        f"{args.concurrency} conversations at a time, {args.prompt_tokens} new tokens a turn, {args.output_tokens} "
        f"answered. turns: {args.turns} of each conversation; shared: {args.systems} beginnings of "
        f"{args.system_tokens} tokens. {args.repeat} rounds, the servers in turns.\n"
    )
    print("\n".join(markdown_table(rows)))
    for error in sorted({error for result in results for error in result.errors}):
        print(f"- FAILED: {error}")
