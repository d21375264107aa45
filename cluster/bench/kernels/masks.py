"""The masks of answers in a form, as the engine has them computed beside its steps. V: vocabulary."""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from cluster.bench.kernels.case import Call, Case
from cluster.checkpoint.made.tokenizer import IM_END, write_tokenizer
from cluster.checkpoint.special_tokens import read_tokenizer_config
from cluster.checkpoint.tokenizer_files import read_tokenizer
from cluster.grammar.grammars import Grammars
from cluster.kernels.sampling.rule import bits
from cluster.structured import Constraint

WAY = "llguidance"
_NUM_TOKENS = 32  # of each answer
_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "age", "tags"],
}
_CONSTRAINT: Constraint = ("json", json.dumps(_SCHEMA))


def mask_cases(vocab_size: int, batches: tuple[int, ...]) -> Iterator[Case]:
    """The masks of so many answers to a JSON schema from their first token to the 32nd, with the states between them,
    in one thread. Most positions are inside a string, where most tokens are allowed."""
    with TemporaryDirectory() as folder:
        write_tokenizer(folder, vocab_size, _NUM_TOKENS)
        config = read_tokenizer_config(Path(folder))
        tokenizer = read_tokenizer(Path(folder), config)
    end = tokenizer.token_to_id(IM_END)
    grammars = Grammars(lambda: tokenizer, vocab_size, [] if end is None else [end])
    for batch in batches:
        answers = [_random_answer(grammars, vocab_size, seed) for seed in range(batch)]
        yield Case(
            kernel=f"masks, {_NUM_TOKENS} steps",
            size=f"batch {batch}",
            ways={WAY: _steps(grammars, answers)},
            num_bytes=0.0,
            num_flops=0.0,
            chosen=WAY,
        )


def _random_answer(grammars: Grammars, vocab_size: int, seed: int) -> list[int]:
    state, draw, tokens = grammars.begin(_CONSTRAINT, ()).result(), random.Random(seed), list[int]()
    while len(tokens) < _NUM_TOKENS and not state.is_complete:
        tokens.append(int(draw.choice(np.flatnonzero(bits(state.mask(), vocab_size)))))
        state.accept(tokens[-1])
    return tokens


def _steps(grammars: Grammars, answers: Sequence[Sequence[int]]) -> Call:
    def call(_: int) -> None:
        states = [grammars.begin(_CONSTRAINT, ()).result() for _ in answers]
        for state, tokens in zip(states, answers, strict=True):
            for token_id in tokens:
                state.mask()
                state.accept(token_id)

    return call
