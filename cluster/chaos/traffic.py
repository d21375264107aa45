"""Streams of mixed lengths, greedy and seeded, some with log-probabilities and stop strings; what became of them."""

import itertools
import random
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from cluster.errors import ClusterError
from cluster.types import SAMPLING_DEFAULTS, SamplingParams

_OUTPUT_TOKENS = (8, 32, 96)
_PROMPT_TOKENS = (1, 7, 40)
_STOP = ("the", "qu")  # of a model with random weights some answers have one
LOGPROB_TOLERANCE = 1e-3  # float32 sums in another order


class Chosen(Protocol):
    """A chosen token's log-probability."""

    @property
    def logprob(self) -> float: ...


class Piece(Protocol):
    """A piece of an answer."""

    @property
    def token_ids(self) -> Iterable[int]: ...
    @property
    def text(self) -> str: ...
    @property
    def logprobs(self) -> Iterable[Chosen]: ...


class Asker(Protocol):
    """A client of the server: over gRPC (`cluster.client`) or HTTP (`http`)."""

    def stream(self, prompt: Sequence[int], params: SamplingParams) -> Iterable[Piece]:
        """Yields the pieces of an answer. Raises ClusterError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    prompt: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """token_ids as they came.  logprobs: of the chosen tokens, where asked for.  arrivals: when pieces came, in seconds
    of the monotonic clock, the asking first."""

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...]
    arrivals: tuple[float, ...]
    error: str = ""

    def says_the_same(self, other: "Reply") -> bool:
        """Tokens and text, and log-probabilities as far as sums in another order keep them."""
        return (
            (self.token_ids, self.text) == (other.token_ids, other.text)
            and len(self.logprobs) == len(other.logprobs)
            and all(abs(a - b) <= LOGPROB_TOLERANCE for a, b in zip(self.logprobs, other.logprobs, strict=True))
        )

    @property
    def gaps_s(self) -> list[float]:
        """Waits between two pieces; the first piece's wait is queueing and does not count."""
        return [b - a for a, b in itertools.pairwise(self.arrivals[1:])]


def make_questions(count: int, vocab_size: int, seed: int) -> list[Question]:
    """Every other one is greedy, the others are drawn with a seed; the same for the same arguments."""
    rng = random.Random(seed)
    questions = []
    for i in range(count):
        prompt = tuple(rng.randrange(vocab_size // 2) for _ in range(rng.choice(_PROMPT_TOKENS)))
        params = SamplingParams(
            temperature=0.0 if i % 2 == 0 else 0.9,
            seed=i,
            max_tokens=rng.choice(_OUTPUT_TOKENS),
            ignore_eos=True,
            logprobs=2 if i % 3 == 0 else None,
            stop=_STOP if i % 5 == 0 else (),
        )
        questions.append(Question(prompt=prompt, params=params.with_defaults(SAMPLING_DEFAULTS)))
    return questions


def ask_all(
    client: Asker, questions: Sequence[Question], concurrency: int, on_reply: Callable[[Reply], None] = lambda _: None
) -> list[Reply]:
    """Asks all, `concurrency` at a time; replies in the order of the questions."""

    def one(question: Question) -> Reply:
        reply = _ask(client, question)
        on_reply(reply)
        return reply

    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(one, questions))


def _ask(client: Asker, question: Question) -> Reply:
    arrivals, text, error = [time.monotonic()], "", ""
    token_ids: list[int] = []
    logprobs: list[float] = []
    try:
        for piece in client.stream(question.prompt, question.params):
            arrivals.append(time.monotonic())
            token_ids += piece.token_ids
            text += piece.text
            logprobs += [entry.logprob for entry in piece.logprobs]
    except ClusterError as failure:
        error = str(failure)
    return Reply(token_ids=tuple(token_ids), text=text, logprobs=tuple(logprobs), arrivals=tuple(arrivals), error=error)
