"""Chooses a token for each row of logits, with the fastest implementation that there is here."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cluster.kernels.native.library import DTYPES, native
from cluster.kernels.sampling.batched import choose_in_batch
from cluster.kernels.sampling.native import choose_natively
from cluster.kernels.sampling.rule import Chosen, Rule


def choose(logits: Tensor, rules: Sequence[Rule]) -> Chosen:
    """logits: [B, V] of any float dtype, unchanged; a rule for each row.

    A row's token depends on nothing but the row and its rule.
    """
    kernels = native() if logits.device.type == "cpu" else None
    if kernels is None or logits.dtype not in DTYPES or logits.stride(1) != 1:
        return choose_in_batch(logits, rules)
    return choose_natively(kernels, logits, rules, torch.get_num_threads())
