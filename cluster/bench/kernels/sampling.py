"""The choice of a step's tokens over the whole vocabulary. V: vocabulary."""

import random
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from cluster.bench.kernels.case import TORCH, Call, Case
from cluster.bench.sampling import Sampling
from cluster.config import ModelConfig
from cluster.kernels.native.library import Native, native
from cluster.kernels.sampling.batched import choose_in_batch
from cluster.kernels.sampling.native import choose_natively
from cluster.kernels.sampling.rule import Rule
from cluster.model.penalties import PenaltyState
from cluster.model.sampler import SamplingRow, rule_of

_NUM_TOKENS = 96  # of each sequence so far, two thirds of them its prompt
_DEVIATION = 3.0  # of the logits, which leaves some thousands of likely tokens


def sampling_cases(
    config: ModelConfig,
    dtype: torch.dtype,
    batches: tuple[int, ...],
    samplings: tuple[Sampling, ...],
    kernels: Mapping[str, Native],
) -> Iterator[Case]:
    """From logits and parameters to tokens, as a step of the engine does it. The logits stay in the caches from turn to
    turn, as they do after lm_head has written them."""
    chosen = native()
    for batch in batches:
        logits = (_DEVIATION * torch.randn(batch, config.vocab_size)).to(dtype)
        for sampling in samplings:
            rows = sampling_rows(sampling, batch, config.vocab_size)
            ways: dict[str, Call] = {TORCH: _by_torch(logits, rows)}
            ways |= {name: _by_kernel(one, logits, rows) for name, one in kernels.items()}
            yield Case(
                kernel=f"sampling, {sampling.name}",
                size=f"batch {batch}",
                ways=ways,
                num_bytes=0.0,
                num_flops=0.0,
                chosen=TORCH if chosen is None else chosen.variant,
            )


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


def _by_torch(logits: Tensor, rows: Sequence[SamplingRow]) -> Call:
    return lambda turn: choose_in_batch(logits, _rules(rows, logits))


def _by_kernel(kernel: Native, logits: Tensor, rows: Sequence[SamplingRow]) -> Call:
    return lambda turn: choose_natively(kernel, logits, _rules(rows, logits), torch.get_num_threads())


def _rules(rows: Sequence[SamplingRow], logits: Tensor) -> list[Rule]:
    return [rule_of(row, logits.shape[1]) for row in rows]
