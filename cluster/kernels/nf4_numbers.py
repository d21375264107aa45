"""The numbers that weights in nf4 and their scales can have. Source: as of `nf4`."""

from functools import cache

import torch
from torch import Tensor

# The quantiles of a normal distribution, as bitsandbytes has them in float32.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@cache
def dynamic_map() -> Tensor:
    """[256] float32, ascending: in each decade from 1e-6 to 1 twice as many as in the one before, the middles of equal
    steps, with both signs; 0 and 1."""
    found = [0.0, 1.0]
    for decade in range(7):
        bounds = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = (bounds[:-1] + bounds[1:]) / 2
        found += (10 ** (decade - 6) * middles).tolist() + (-(10 ** (decade - 6)) * middles).tolist()
    return torch.tensor(sorted(found))
