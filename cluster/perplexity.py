"""Perplexity of token ids under a model, by windows that slide over them. Knows no model: a function scores windows.

Source: transformers' guide "Perplexity of fixed-length models". Each window sees `context` tokens and begins `stride`
after the one before; the tokens that no window before has scored count, each after all earlier ones of its window. The
guide lets a window's mean weigh one less than its new tokens, as if the first of them never counted: where windows
overlap, the first window weighs a little more than its share. `perplexity` is the guide's number, so that it compares
with others'; `token_perplexity` counts each token once.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from cluster.errors import SetupError

DEFAULT_CONTEXT, DEFAULT_STRIDE = 2048, 512

Score = Callable[[Sequence[Sequence[int]]], Sequence[NDArray[np.float32]]]
"""Of each window, the log-probability of its tokens after the first, each given those before it: [tokens - 1]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """context: tokens of a window. stride: tokens from one's begin to the next one's. Raises SetupError."""

    context: int
    stride: int

    def __post_init__(self) -> None:
        if self.context < 2:
            raise SetupError(f"context is {self.context}, at least 2 tokens are needed")
        if not 2 <= self.stride <= self.context:
            raise SetupError(f"stride is {self.stride}, from 2 to context ({self.context}) is needed")

    @classmethod
    def of(cls, context: int | None, stride: int | None, max_model_len: int) -> "Windows":
        """context: None for the model's, at most 2048 tokens. stride: None for 512, or a shorter context."""
        if context is None:
            context = min(max_model_len, DEFAULT_CONTEXT)
        elif context > max_model_len:
            raise SetupError(f"context is {context}, the model's has {max_model_len} tokens")
        return cls(context=context, stride=min(context, DEFAULT_STRIDE) if stride is None else stride)

    def over(self, num_tokens: int) -> Iterator[tuple[int, int, int]]:
        """Begin, end and new tokens of each window."""
        before = 0
        for begin in range(0, num_tokens, self.stride):
            end = min(begin + self.context, num_tokens)
            yield begin, end, end - before
            before = end
            if end == num_tokens:
                return


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """num_tokens: tokens of the text; the first one has no probability."""

    perplexity: float
    token_perplexity: float
    num_tokens: int
    num_windows: int
    context: int
    stride: int


def perplexity(
    token_ids: Sequence[int],
    windows: Windows,
    score: Score,
    *,
    batch: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Scores all windows, `batch` of them in a call. progress: called with tokens scored, and tokens in all.

    Raises SetupError for fewer than two tokens, and what `score` raises.
    """
    if len(token_ids) < 2:
        raise SetupError(f"the text has {len(token_ids)} tokens: at least 2 are needed, the first has no probability")
    means, weights, counts = [], [], []
    spans = windows.over(len(token_ids))
    while members := list(islice(spans, batch)):
        found = score([token_ids[begin:end] for begin, end, _ in members])
        for (_, end, num_new), logprobs in zip(members, found, strict=True):
            counted = np.asarray(logprobs, dtype=np.float64)[-num_new:]
            means.append(-float(counted.mean()) if len(counted) else 0.0)
            weights.append(num_new - 1)
            counts.append(len(counted))
            if progress is not None:
                progress(end, len(token_ids))
    return Perplexity(
        perplexity=_weighted(means, weights),
        token_perplexity=_weighted(means, counts),
        num_tokens=len(token_ids),
        num_windows=len(means),
        context=windows.context,
        stride=windows.stride,
    )


def _weighted(means: Sequence[float], weights: Sequence[int]) -> float:
    """e to the weighted mean; the first window has a weight."""
    mean = sum(mean * weight for mean, weight in zip(means, weights, strict=True)) / sum(weights)
    return math.exp(mean) if mean < 700 else math.inf
