"""Random numbers in the forms in which a checkpoint may have its linear layers rounded. For benches.

K: inputs, N: outputs.
"""

import torch
from torch import Tensor

from cluster.config.gptq import Gptq
from cluster.config.stored import INTEGERS, SIZES, StoredForm

_DEVIATION = 0.02  # of the weights that they mean, as of plain ones that are drawn
_MIDDLES = 0x77777777, 0x88888888 - (1 << 32)  # eight zeros of 8: less one, and as they are


def draw_rounded(
    form: StoredForm, name: str, target: Tensor, generator: torch.Generator, shape: tuple[int, int]
) -> None:
    """Fills a tensor of a layer. shape: of the layer's matrix, [N, K]."""
    if name.endswith(SIZES):
        target.copy_(torch.tensor(shape))
    elif name.endswith(".g_idx"):
        target.copy_(torch.arange(shape[1]) // (form.group_size or shape[1]))
    elif name.endswith(".qzeros") and form.is_symmetric:
        assert isinstance(form, Gptq)
        target.fill_(_MIDDLES[1 - form.zero_shift])
    elif name.endswith(INTEGERS):
        target.random_(-(1 << 31), 1 << 31, generator=generator)
    else:
        target.fill_(_DEVIATION * 12**0.5 / (1 << form.num_bits))  # of numbers that are equally frequent
