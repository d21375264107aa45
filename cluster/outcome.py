"""Kinds of results that a request may want of a model, and numbers on their way between processes. Knows no tensors.

T: tokens of the prompt, H: hidden size, L: labels.
"""

import math
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np

from cluster.evolving import evolving

Wants = Literal[
    "tokens",  # new ones, sampled one after the other
    "token_logprobs",  # [T - 1]: of each prompt token after the first, given those before it
    "hidden_states",  # [T, H], after the last norm
    "last_hidden_state",  # [H], the last token's
    "mean_hidden_state",  # [H], over all tokens
]
EVERY_ROW: tuple[Wants, ...] = ("token_logprobs", "hidden_states", "mean_hidden_state")


@evolving("cluster.outcome")
@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """float32 numbers as bytes, little-endian, in row-major order: Python's floats would take ten times the room."""

    shape: tuple[int, ...]
    data: bytes

    def __post_init__(self) -> None:
        assert len(self.data) == 4 * math.prod(self.shape)

    @classmethod
    def of(cls, array: np.ndarray) -> Self:
        return cls(shape=tuple(array.shape), data=np.ascontiguousarray(array, dtype="<f4").tobytes())

    def array(self) -> np.ndarray:
        """A copy that may be written to."""
        return np.frombuffer(self.data, dtype="<f4").reshape(self.shape).astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """A finished result of numbers. prompt_token_ids: those that were computed."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    numbers: Numbers
