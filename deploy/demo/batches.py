"""Draws what the demo's model is trained with: conversations of questions and answers as batches of tokens.

Knows no model.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from texts import Pair, varied
from torch import Tensor

from cluster.checkpoint.made.tokenizer import ENDOFTEXT, IM_END, IM_START

SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are the demo of moe-cluster.",
    "Answer briefly.",
    "You are a friendly assistant. Answer in one sentence.",
    "Be polite.",
)
BATCH, SHORT_BATCH = (4, 192), (28, 28)  # rows, tokens
UNKNOWN_SHARE = 0.15  # of the turns: these questions have the most words of their own
QUESTION_WEIGHT = 0.1  # of the loss, for a question's tokens; an answer's have 1
NUM_FIRST_TOKENS, FIRST_WEIGHT = 4, 3.0  # an answer's first tokens decide which one it is

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class Batch:
    """[B, T] each. weights: of a token's loss.  topics: −1 where none is known.  pairs: the number of the pair whose
    answer begins after this token, else −1."""

    ids: Tensor
    weights: Tensor
    topics: Tensor
    pairs: Tensor


class Row:
    """A batch's row while it grows: a list for each of `Batch`'s tensors."""

    def __init__(self, encode: Encode) -> None:
        self._encode = encode
        self.ids: list[int] = []
        self.weights: list[float] = []
        self.topics: list[int] = []
        self.pairs: list[int] = []

    def add(self, text: str, weight: float = 0.0, topic: int = -1) -> None:
        new = self._encode(text)
        self.ids += new
        self.weights += [weight] * len(new)
        self.topics += [topic] * len(new)
        self.pairs += [-1] * len(new)

    def cut(self, num_tokens: int, pad_id: int) -> "Row":
        """Shortens or pads it in place."""
        for values, filler in ((self.ids, pad_id), (self.weights, 0.0), (self.topics, -1), (self.pairs, -1)):
            del values[num_tokens:]
            values += [filler] * (num_tokens - len(values))
        return self


class Conversations:
    """Draws batches, of conversations and of short rows in turn.

    A conversation begins with a system message at times, and has as many turns as its row holds. A short row has one
    turn up to the first words of its answer: they show whether the question was understood, the rest is only recited.
    """

    def __init__(self, pairs: list[Pair], encode: Encode, seed: int) -> None:
        self._encode, self.rng = encode, random.Random(seed)
        self.topics = sorted({pair.topic for pair in pairs})
        self.num_pairs = len(pairs)
        self._number = {pair: number for number, pair in enumerate(pairs)}
        self._known = [pair for pair in pairs if pair.topic != "unknown"]
        self._unknown = [pair for pair in pairs if pair.topic == "unknown"]
        [self._pad_id] = encode(ENDOFTEXT)

    def batch(self, *, short: bool) -> Batch:
        num_rows, num_tokens = SHORT_BATCH if short else BATCH
        rows = [self._row(1 if short else num_tokens).cut(num_tokens, self._pad_id) for _ in range(num_rows)]
        return Batch(*(torch.tensor([getattr(row, f.name) for row in rows]) for f in fields(Batch)))

    def _row(self, min_tokens: int) -> Row:
        row = Row(self._encode)
        chat = self.rng.random() < 0.95
        if chat and self.rng.random() < 0.1:
            row.add(f"{IM_START}system\n{self.rng.choice(SYSTEM_MESSAGES)}{IM_END}\n")
        while len(row.ids) < min_tokens:
            pair = self.rng.choice(self._unknown if self.rng.random() < UNKNOWN_SHARE else self._known)
            if chat:
                self._turn(row, pair)
            else:  # plain text, for prompts without a chat template
                row.add(pair.answer + ENDOFTEXT, 1.0)
        return row

    def _turn(self, row: Row, pair: Pair) -> None:
        topic = self.topics.index(pair.topic)
        row.add(f"{IM_START}user\n")
        row.add(f"{varied(self.rng.choice(pair.wordings), self.rng)}{IM_END}\n", QUESTION_WEIGHT)
        row.add(f"{IM_START}assistant\n", 0.0, topic)
        row.pairs[-1] = self._number[pair]
        begin = len(row.ids)
        row.add(f"{pair.answer}{IM_END}", 1.0, topic)
        for at in range(begin, min(begin + NUM_FIRST_TOKENS, len(row.ids))):
            row.weights[at] = FIRST_WEIGHT
        row.add("\n", 0.0, topic)
