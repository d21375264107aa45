"""How a row's token is chosen, and which one was. Knows no computing. B: rows, V: vocabulary."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]
Mask = NDArray[np.int32]  # [V / 32 or more]: a bit for each token, the lowest first

NO_IDS: Ids = np.empty(0, dtype=np.int32)
NOT_FINITE = -1  # in place of a token: the row's largest number is NaN or infinite
NONE_LEFT = -2  # in place of a token: every one that has a finite logit is banned or not allowed


class Rule(NamedTuple):
    """How one row's token is chosen.

    The order: the mask, which makes all but the allowed logits -inf; log-probabilities; penalties; bans; temperature,
    top_k, top_p, min_p, and the inverse of the cumulative distribution at the number of `seed` and `position`. Of equal
    ones the lowest id is first.

    temperature: 0 takes the largest logit.  top_k: 0 keeps all.  max_distance: min_p as the largest distance from the
    best token, -ln(min_p).  num_top: how many of the likeliest tokens' log-probabilities are wanted beside that of the
    chosen one; -1 for none at all.
    ids: distinct tokens of the sequence, in [0, V), if there are penalties.  counts: how often each is in the output.
    banned: ids in [0, V) that are not chosen.  allowed: the mask, None for every token.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    max_distance: float = float("inf")
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    num_top: int = -1
    seed: int = 0
    position: int = 0
    ids: Ids = NO_IDS
    counts: Ids = NO_IDS
    banned: Ids = NO_IDS
    allowed: Mask | None = None

    @property
    def takes_largest(self) -> bool:
        """Whether the token is that of the largest logit, as the logits are."""
        changes = len(self.ids) or len(self.banned) or self.allowed is not None
        return self.temperature == 0.0 and not changes


PLAIN = Rule()


@dataclass(frozen=True, slots=True)
class Chosen:
    """The rows' tokens, [B], NOT_FINITE or NONE_LEFT where there is none, and log-probabilities where a rule wants any.

    logprobs: [B], of the tokens.  top_ids, top_logprobs: [B, n] or more rows and columns than are wanted, best first.
    """

    token_ids: list[int]
    logprobs: list[float]
    top_ids: list[list[int]]
    top_logprobs: list[list[float]]


def bits(mask: Mask, vocab_size: int) -> NDArray[np.bool_]:
    """A mask's bits, [V]."""
    octets = mask.astype("<i4", copy=False).view(np.uint8)
    return np.unpackbits(octets, count=vocab_size, bitorder="little").view(np.bool_)


def leaves_any(mask: Mask, without: Iterable[int]) -> bool:
    """Whether a mask allows a token that is none of these."""
    octets = mask.astype("<i4", copy=True).view(np.uint8)
    for token_id in without:
        if token_id // 8 < len(octets):
            octets[token_id // 8] &= ~(1 << token_id % 8) & 0xFF
    return bool(octets.any())
