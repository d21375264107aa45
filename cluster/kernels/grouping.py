"""Puts the (token, expert) pairs of a batch in the order of their experts.

T: tokens, K: experts a token, L: experts of a set.
"""

import torch
from torch import Tensor


def group_pairs(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts the pairs by expert, those of other sets last, tokens in order within an expert. topk_ids: [T, K] int64,
    below zero for a pair that is computed elsewhere.

    Returns each sorted pair's token [T*K] int64, its number in topk_ids [T*K] int64, and the pairs of each expert [L].
    """
    flat_ids = topk_ids.flatten()
    flat_ids = torch.where(flat_ids < 0, num_experts, flat_ids)
    sorted_ids, order = flat_ids.sort(stable=True)
    bounds = torch.searchsorted(sorted_ids, torch.arange(num_experts + 1, device=flat_ids.device))
    return order // topk_ids.shape[1], order, bounds.diff()
