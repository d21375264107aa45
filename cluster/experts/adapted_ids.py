"""Rows that an adapter computes have it in their experts' ids, so that no carrier needs to know of adapters.

The id of expert e with the adapter of number n is e + (n + 1) (E + 1). None of these is below E + 1: what knows no
adapters takes them for unknown experts, and never for others. E: experts of a layer, T: rows, K: experts a row.
"""

import numpy as np
from torch import Tensor

NO_ADAPTER = -1  # the number of none


def offset_of(number: int, num_experts: int) -> int:
    """The number that is added to the ids of an adapter's rows; 0 for NO_ADAPTER."""
    return (number + 1) * (num_experts + 1)


def adapted(topk_ids: Tensor, offsets: Tensor) -> Tensor:
    """topk_ids: [T, K] int64, negative for no expert; offsets: [T] int64, of each row's adapter."""
    return topk_ids + offsets.unsqueeze(1) * (topk_ids >= 0)


def experts_of(topk_ids: np.ndarray, num_experts: int) -> np.ndarray:
    """The experts alone: [T, K], negative for none."""
    found: np.ndarray = np.where(topk_ids < 0, topk_ids, topk_ids % (num_experts + 1))
    return found


def numbers_of(topk_ids: np.ndarray, num_experts: int) -> np.ndarray:
    """The number of each slot's adapter, NO_ADAPTER for none: [T, K]."""
    found: np.ndarray = np.where(topk_ids < 0, NO_ADAPTER, topk_ids // (num_experts + 1) - 1)
    return found
