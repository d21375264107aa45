"""From logits to tokens. Knows no scheduler; remembers, for each sequence with penalties, which tokens it has.

Every row is computed from its own logits, parameters and seed alone, so a sequence samples the same tokens whatever
else is in the batch. B: rows, V: vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cluster.errors import InvalidRequest
from cluster.types import Logprobs, SamplingParams

Sampled = tuple[int, Logprobs | None]

_LARGEST = torch.finfo(torch.float32).max


class NoFiniteNumbers(ArithmeticError):
    """A row's largest number is NaN or infinite: the model has no answer for it."""


@dataclass(slots=True)
class PenaltyState:
    """The distinct tokens of one sequence and how often each stands in its output; grows by one token a step."""

    token_ids: list[int] = field(default_factory=list)
    output_counts: list[int] = field(default_factory=list)
    slots: dict[int, int] = field(default_factory=dict)
    num_seen: int = 0

    def extend(self, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        """Takes in the tokens past `num_seen`; those past the prompt count as output."""
        for position in range(self.num_seen, len(token_ids)):
            token_id = token_ids[position]
            slot = self.slots.setdefault(token_id, len(self.token_ids))
            if slot == len(self.token_ids):
                self.token_ids.append(token_id)
                self.output_counts.append(0)
            self.output_counts[slot] += position >= num_prompt_tokens
        self.num_seen = len(token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRow:
    """The sampler's view of one sequence.

    token_ids: prompt and output so far.  params: every default filled in, the seed too.
    banned_token_ids: not to be chosen (the ends of a sequence below min_tokens).  penalties: kept by the sequence.
    """

    token_ids: Sequence[int]
    num_prompt_tokens: int
    params: SamplingParams
    penalties: PenaltyState
    banned_token_ids: tuple[int, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether the token is that of the largest logit, and nothing else is asked for."""
        params = self.params
        return params.greedy and params.logprobs is None and not self.banned_token_ids and not params.has_penalties


@torch.inference_mode()
def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[Sampled | Exception]:
    """Chooses one token a row. logits: [B, V] in the model's dtype.

    Returns the tokens and, where asked for, log-probabilities under the model's own distribution; for a row that fails
    its exception, NoFiniteNumbers where the largest logit is none.
    """
    best = _argmax(logits)  # [B]; a NaN counts as the largest
    finite = logits.gather(1, best.unsqueeze(1)).squeeze(1).isfinite()
    chosen: list[Sampled | Exception] = []
    for i, (token_id, is_finite) in enumerate(torch.stack([best, finite]).t().tolist()):  # one copy from the device
        if not is_finite:
            chosen.append(NoFiniteNumbers("the largest logit is NaN or infinite"))
        elif rows[i].is_plain:
            chosen.append((token_id, None))
        else:
            try:
                chosen.append(_choose(logits[i].to(torch.float32, copy=True), rows[i]))
            except Exception as error:  # noqa: BLE001 it is this row's alone: the others have their tokens
                chosen.append(error)
    return chosen


def _choose(logits: Tensor, row: SamplingRow) -> Sampled:
    """One row whose largest logit is not all that is asked for. logits: [V] float32, overwritten.

    Raises InvalidRequest where the parameters leave no token.
    """
    num_top = row.params.logprobs
    logprobs = None if num_top is None else logits.log_softmax(dim=-1)
    if row.banned_token_ids:
        if len(row.banned_token_ids) >= logits.numel():
            raise InvalidRequest(
                "min_tokens leaves no token to choose: every token of the vocabulary ends the answer", "min_tokens"
            )
        logits[list(row.banned_token_ids)] = -torch.inf
    penalize(logits, row)
    token_id = int(logits.argmax()) if row.params.greedy else _draw(logits, row)
    return token_id, None if logprobs is None else _logprobs(logprobs, token_id, num_top or 0)


def _argmax(logits: Tensor) -> Tensor:
    """[B, V] -> [B] int64. In 16 bits on the CPU by parts: torch's own takes 8 ms there where `amax` takes 0.5."""
    num_rows, vocab_size = logits.shape
    width = math.gcd(vocab_size, 128)
    if logits.device.type != "cpu" or logits.dtype == torch.float32 or width == 1:
        return logits.argmax(dim=-1)
    parts = logits.view(num_rows, -1, width)
    part = parts.amax(dim=-1).float().argmax(dim=-1)  # [B]
    inside = parts[torch.arange(num_rows), part].float().argmax(dim=-1)
    return part * width + inside


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but the seed and the token's position in its sequence.

    Counter-based (Philox): a sequence that is replayed elsewhere from its tokens goes on with the same numbers.
    """
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position << 64)).random())


def penalize(logits: Tensor, row: SamplingRow) -> None:
    """In place, over the sequence's distinct tokens only. logits: [V].

    Source: repetition as in HF's RepetitionPenaltyLogitsProcessor; presence and frequency as in OpenAI's API.
    """
    if not row.params.has_penalties:
        return
    repetition = row.params.repetition_penalty or 1.0
    presence = row.params.presence_penalty or 0.0
    frequency = row.params.frequency_penalty or 0.0
    row.penalties.extend(row.token_ids, row.num_prompt_tokens)
    ids = torch.tensor(row.penalties.token_ids, device=logits.device)
    counts = torch.tensor(row.penalties.output_counts, device=logits.device)
    values = logits[ids]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values = values.clamp(min=-_LARGEST, max=_LARGEST)  # a tiny penalty makes infinities, and their difference NaN
    logits[ids] = values - frequency * counts - presence * (counts > 0)


def _draw(logits: Tensor, row: SamplingRow) -> int:
    """Temperature, top_k, top_p, min_p, then the inverse of the cumulative distribution at the row's number. [V]."""
    params = row.params
    assert params.temperature, "greedy rows are not drawn"
    scaled = (logits - logits.max()) / params.temperature  # at most 0: a low temperature makes no infinities but -inf
    top_k, top_p, min_p = params.top_k or 0, params.top_p or 1.0, params.min_p or 0.0
    token_ids: Tensor | None = None
    if 0 < top_k < scaled.numel():
        scaled, token_ids = scaled.topk(top_k)
    elif top_p < 1.0:
        scaled, token_ids = scaled.sort(descending=True, stable=True)
    probs = scaled.double().softmax(dim=-1)
    if top_p < 1.0:
        probs = torch.where(probs.cumsum(dim=-1) - probs < top_p, probs, 0.0)  # the first token that reaches it stays
    if min_p > 0.0:
        probs = torch.where(probs >= min_p * probs.max(), probs, 0.0)
    cumulative = probs.cumsum(dim=-1)
    position = len(row.token_ids)
    number = torch.tensor([uniform(params.seed or 0, position)], dtype=torch.float64, device=logits.device)
    index = torch.searchsorted(cumulative, number * cumulative[-1], right=True).clamp_max(cumulative.numel() - 1)
    return int(index if token_ids is None else token_ids[index])


def _logprobs(logprobs: Tensor, token_id: int, num_top: int) -> Logprobs:
    values, ids = logprobs.topk(min(num_top, logprobs.numel()))  # a small vocabulary has no more
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Logprobs(token_id, float(logprobs[token_id]), top)
