"""The choice of a step's tokens over the whole vocabulary. V: vocabulary."""

import random
from collections.abc import Iterator

import torch
from torch import Tensor

from cluster.bench.kernels.case import TORCH, Call, Case
from cluster.bench.sampling import Sampling
from cluster.config import ModelConfig
from cluster.model.penalties import PenaltyState
from cluster.model.sampler import SamplingRow, sample

_NUM_TOKENS = 96  # of each sequence so far, two thirds of them its prompt


def sampling_cases(
    config: ModelConfig, dtype: torch.dtype, batches: tuple[int, ...], samplings: tuple[Sampling, ...]
) -> Iterator[Case]:
    """Logits stay in the caches from turn to turn, as they do after lm_head has written them. They are normal with
    deviation 3, which leaves a few thousand likely tokens."""
    for batch in batches:
        logits = 3 * torch.randn(batch, config.vocab_size)
        logits = logits.to(dtype)
        for sampling in samplings:
            rows = sampling_rows(sampling, batch, config.vocab_size)
            yield Case(
                kernel=f"sampling, {sampling.name}",
                size=f"batch {batch}",
                ways={TORCH: _step(logits, rows)},
                num_bytes=0.0,
                num_flops=0.0,
                chosen=TORCH,
            )


def _step(logits: Tensor, rows: list[SamplingRow]) -> Call:
    return lambda turn: sample(logits, rows)


def sampling_rows(sampling: Sampling, batch: int, vocab_size: int) -> list[SamplingRow]:
    """A row for each sequence of a step, with random tokens so far."""
    draw = random.Random(batch)
    return [
        SamplingRow(
            token_ids=[draw.randrange(vocab_size) for _ in range(_NUM_TOKENS)],
            num_prompt_tokens=2 * _NUM_TOKENS // 3,
            params=params,
            penalties=PenaltyState(),
        )
        for params in sampling.params(batch, _NUM_TOKENS)
    ]
