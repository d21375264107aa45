"""One row's token in plain torch operations: the definition that the fast paths are compared with. V: vocabulary."""

import torch
from torch import Tensor

from cluster.kernels.sampling.random_numbers import uniform
from cluster.kernels.sampling.rule import NONE_LEFT, NOT_FINITE, Rule, bits

LARGEST = torch.finfo(torch.float32).max


def choose_one(logits: Tensor, rule: Rule) -> tuple[int, float, list[tuple[int, float]]]:
    """logits: [V]. Returns the token (or NOT_FINITE, NONE_LEFT), its log-probability and the likeliest tokens', as many
    as are wanted: one that is not allowed has -inf."""
    logits = logits.to(torch.float32, copy=True)
    if not bool(logits.max().isfinite()):  # a NaN is the largest
        return NOT_FINITE, 0.0, []
    forbidden = torch.zeros(logits.numel(), dtype=torch.bool)
    if rule.allowed is not None:
        forbidden = torch.from_numpy(~bits(rule.allowed, logits.numel()))
    logits[forbidden] = -torch.inf
    logprobs = logits.double().log_softmax(dim=-1).float()  # a sum in float32 is off by 1e-4 in a large vocabulary
    penalize(logits, rule)
    logits[torch.from_numpy(rule.banned).long()] = -torch.inf
    logits[forbidden] = -torch.inf  # a penalty has made numbers of them
    if bool(logits.max() == -torch.inf):
        return NONE_LEFT, 0.0, []
    token_id = draw(logits, rule) if rule.temperature else int(logits.argmax())
    values, ids = logprobs.sort(descending=True, stable=True)
    top = list(zip(ids.tolist(), values.tolist(), strict=True))[: max(rule.num_top, 0)]
    return token_id, float(logprobs[token_id]), top


def penalize(logits: Tensor, rule: Rule) -> None:
    """In place, over the sequence's distinct tokens only. logits: [V] float32.

    Source: repetition as in HF's RepetitionPenaltyLogitsProcessor; presence and frequency as in OpenAI's API.
    """
    ids, counts = torch.from_numpy(rule.ids).long(), torch.from_numpy(rule.counts)
    values = logits[ids]
    values = torch.where(values > 0, values / rule.repetition, values * rule.repetition)
    # A tiny penalty makes infinities, and their difference NaN; so does a factor of zero times -inf.
    values = values.nan_to_num(nan=-LARGEST, posinf=LARGEST, neginf=-LARGEST)
    logits[ids] = values - rule.frequency * counts - rule.presence * (counts > 0)


def draw(logits: Tensor, rule: Rule) -> int:
    """Temperature, top_k, top_p, min_p, then the inverse of the cumulative distribution at the row's number. [V]."""
    scaled = (logits - logits.max()) / rule.temperature  # at most 0: a low temperature makes no infinities but -inf
    token_ids = torch.arange(scaled.numel())
    top_k = rule.top_k if 0 < rule.top_k < scaled.numel() else 0
    if top_k or rule.top_p < 1.0:
        scaled, token_ids = scaled.sort(descending=True, stable=True)
    if top_k:
        scaled, token_ids = scaled[:top_k], token_ids[:top_k]
    probs = scaled.double().softmax(dim=-1)
    if rule.top_p < 1.0:
        probs = torch.where(probs.cumsum(dim=-1) - probs < rule.top_p, probs, 0.0)  # the first that reaches it stays
    probs = torch.where(scaled.double() >= -rule.max_distance, probs, 0.0)
    cumulative = probs.cumsum(dim=-1)
    number = torch.tensor([uniform(rule.seed, rule.position)], dtype=torch.float64)
    index = torch.searchsorted(cumulative, number * cumulative[-1], right=True).clamp_max(cumulative.numel() - 1)
    return int(token_ids[index])
