"""Random rows of logits and rules for the samplers' tests, and a comparison with the definition."""

import numpy as np
import torch

from cluster.kernels.sampling.reference import choose_one
from cluster.kernels.sampling.rule import Chosen, Mask, Rule

VOCAB_SIZES = (1, 2, 7, 30, 257, 1000, 2500)


def random_rule(random: np.random.Generator, vocab_size: int) -> Rule:
    """Every setting on its own, or not: usual values, and those at the ends of what a request may have."""

    def one_of(*values: float) -> float:
        return values[random.integers(len(values))]

    def ids() -> np.ndarray:
        many = random.integers(1, vocab_size + 1) if random.random() < 0.2 else min(vocab_size, 5)
        return random.permutation(vocab_size)[:many].astype(np.int32)

    rule = Rule(
        temperature=one_of(0.0, 1.0, 1e-5, 0.3, 0.7, 2.5, 100.0),
        top_k=int(one_of(0, 0, 1, 2, 5, 20, 300, vocab_size - 1, vocab_size, 2**31 - 1)),
        top_p=one_of(1.0, 1.0, random.uniform(1e-9, 1e-3), random.uniform(), random.uniform(0.9, 1), 1 - 1e-15),
        max_distance=-np.log(one_of(1.0, 1e-300, random.uniform(), 0.05)) if random.random() < 0.3 else np.inf,
        num_top=int(one_of(-1, -1, 0, 1, 5, 20, vocab_size + 3)),
        seed=int(random.integers(2**63)),
        position=int(random.integers(2**33)),
        banned=ids() if random.random() < 0.2 else np.empty(0, np.int32),
    )
    if random.random() < 0.3:
        rule = rule._replace(allowed=random_mask(random, vocab_size))
    if random.random() < 0.5:
        penalized = ids()
        rule = rule._replace(
            repetition=one_of(1.05, 0.5, 1e-300, 1e-45, 100.0), presence=one_of(0.0, 0.7, -2.0),
            frequency=one_of(0.0, 0.3, 2.0), ids=penalized,
            counts=random.integers(0, 3, len(penalized)).astype(np.int32),
        )  # fmt: skip
    return rule


def random_mask(random: np.random.Generator, vocab_size: int) -> Mask:
    """Of few tokens or many, with arbitrary bits behind the vocabulary's; at times with none at all."""
    bits = random.random(-(-(vocab_size + 1) // 32) * 32) < random.choice([0.0, 2 / vocab_size, 0.1, 0.5, 0.99, 1.0])
    return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)


def random_logits(random: np.random.Generator, num_rows: int, vocab_size: int) -> torch.Tensor:
    """[B, V] float32 with rows of every kind: even and peaked, with ties, infinities, NaN, the largest numbers."""
    logits = torch.from_numpy(random.normal(0, 1, (num_rows, vocab_size)).astype(np.float32))
    for row in logits:
        kind = random.integers(10)
        row *= float(random.choice([0.0, 0.1, 1.0, 4.0, 30.0]))
        if kind == 0:
            row.copy_((row * 2).round())  # ties
        elif kind == 1:
            row[torch.from_numpy(random.random(vocab_size) < 0.7)] = -torch.inf
        elif kind == 2:
            row[random.integers(vocab_size)] = float(random.choice([np.nan, np.inf, 3e38]))
        elif kind == 3:
            row.fill_(float(random.choice([0.0, -0.0, -torch.inf, 7.5])))
    return logits


def check(chosen: Chosen, logits: torch.Tensor, rules: list[Rule], tolerance: float = 2e-6) -> None:
    """Compares with the definition, row by row. logits: [B, V] of any dtype."""
    vocab_size = logits.shape[1]
    for i, rule in enumerate(rules):
        token_id, logprob, top = choose_one(logits[i], rule)
        assert chosen.token_ids[i] == token_id, (i, rule)
        if rule.num_top < 0 or token_id < 0:
            continue
        num_top = min(rule.num_top, vocab_size)
        ids, values = chosen.top_ids[i][:num_top], chosen.top_logprobs[i][:num_top]
        expected = np.array([value for _, value in top])
        np.testing.assert_allclose(chosen.logprobs[i], logprob, atol=tolerance, rtol=1e-6)
        np.testing.assert_allclose(values, expected, atol=tolerance, rtol=1e-6)
        assert len(set(ids)) == len(ids) == num_top
        row = logits[i].double()
        if rule.allowed is not None:
            octets = rule.allowed.view(np.uint8)
            allowed = [bool(octets[token // 8] >> token % 8 & 1) for token in range(vocab_size)]
            assert allowed[token_id]
            row = row.masked_fill(~torch.tensor(allowed), -torch.inf)
        exact = row.log_softmax(dim=-1)[ids]
        np.testing.assert_allclose(exact.numpy(), expected, atol=tolerance, rtol=1e-6)
