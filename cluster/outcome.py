"""Kinds of results that a request may want of a model, the heads that give them, and numbers on their way between
processes. Knows no tensors.

T: tokens of the prompt, H: hidden size, L: labels.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np

from cluster.errors import InvalidRequest
from cluster.evolving import evolving

Wants = Literal[
    "tokens",  # new ones, sampled one after the other
    "token_logprobs",  # [T - 1]: of each prompt token after the first, given those before it; with `logprobs` n in the
    # request's params [T - 1, 2 + 2n]: then its rank, the likeliest tokens' ids, and their log-probabilities
    "hidden_states",  # [T, H], after the last norm
    "last_hidden_state",  # [H], the last token's
    "mean_hidden_state",  # [H], over all tokens
    "label_logits",  # [L], of the whole prompt
    "token_label_logits",  # [T, L]
    "span_logits",  # [T, 2]: of each token as an answer's first, and as its last one
]
EVERY_ROW: tuple[Wants, ...] = (
    "token_logprobs", "hidden_states", "mean_hidden_state", "token_label_logits", "span_logits",
)  # fmt: skip
CALLS: Mapping[Wants, str] = {  # the rpcs that give them
    "tokens": "Generate",
    "token_logprobs": "Score",
    "last_hidden_state": "Embed",
    "mean_hidden_state": "Embed",
    "hidden_states": "Embed",
    "label_logits": "Classify",
    "token_label_logits": "ClassifyTokens",
    "span_logits": "AnswerSpan",
}
_OF_EACH: tuple[Wants, ...] = ("hidden_states", "last_hidden_state", "mean_hidden_state")
HeadKind = Literal[
    "causal_lm", "none", "sequence_classification", "token_classification", "question_answering"
]  # fmt: skip
Activation = Literal["softmax", "sigmoid", "none"]
SERVES: Mapping[HeadKind, tuple[Wants, ...]] = {
    "causal_lm": ("tokens", "token_logprobs", *_OF_EACH),
    "none": _OF_EACH,
    "sequence_classification": ("label_logits", *_OF_EACH),
    "token_classification": ("token_label_logits", *_OF_EACH),
    "question_answering": ("span_logits", *_OF_EACH),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The layer of a model above its decoder.

    labels: the names of its outputs in their order; none for next tokens.
    activation: makes probabilities of a prompt's logits; "none" where the model gives numbers (regression).
    pad_token_id: a classified prompt ends at its last token that is not this one; None: at its last.
    """

    kind: HeadKind = "causal_lm"
    labels: tuple[str, ...] = ()
    activation: Activation = "softmax"
    has_bias: bool = False
    pad_token_id: int | None = None

    def __str__(self) -> str:
        match self.kind:
            case "none":
                return "no head"
            case "causal_lm":
                return "a head for next tokens"
            case "question_answering":
                return "a head for question answering"
        return f"a head for {self.kind.replace('_', ' ')} with {len(self.labels)} labels"

    @property
    def generates(self) -> bool:
        return self.kind == "causal_lm"

    def check_serves(self, wants: Wants) -> None:
        """Raises InvalidRequest that names the calls which this head answers."""
        served = SERVES[self.kind]
        if wants not in served:
            *others, last = dict.fromkeys(CALLS[one] for one in served)
            calls = f"{', '.join(others)} and {last}" if others else last
            raise InvalidRequest(f"this model has {self}: it answers {calls}, not {CALLS[wants]}", "model")

    def classified(self, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        """A prompt up to the token whose logits are its labels': none after it changes them. As in transformers, a
        prompt of nothing but padding is classified by its first token."""
        length = len(token_ids)
        while self.pad_token_id is not None and length > 1 and token_ids[length - 1] == self.pad_token_id:
            length -= 1
        return token_ids[:length]


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
