"""Reads a layer's tensors in each form in which a checkpoint may have it rounded. Knows no files and no products.

N: outputs, K: inputs, G: groups of inputs.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from cluster.config.awq import INTERLEAVED, Awq
from cluster.config.gptq import Gptq
from cluster.config.packed import Packed
from cluster.config.stored import StoredForm
from cluster.errors import CheckpointError

_MIDDLE = 8  # a number of 4 bits less this is from -8 to 7
_OUTPUTS = sorted(range(8), key=INTERLEAVED.__getitem__)  # where in an int32 each of AWQ's eight outputs lies

Tensors = Mapping[str, Tensor]  # by the ends of their names


class StoredMatrix(NamedTuple):
    """(numbers - zeros) * scales, a group's for each of its inputs.

    numbers: [N, K] int8, of 4 bits -8 to 7.  scales: [N, G] float32.  zeros: [N, G] int8, None for none.
    order: [K] int64, the input that comes first, second, …, and all of the above in it; None for their own.
    """

    numbers: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None = None


def read_matrix(form: StoredForm, layer: str, tensors: Tensors, num_inputs: int) -> StoredMatrix:
    """Raises CheckpointError for numbers that the form cannot have. layer: its name, for messages."""
    if isinstance(form, Gptq):
        found = _read_gptq(form, layer, tensors, num_inputs)
    elif isinstance(form, Awq):
        found = _read_awq(tensors)
    else:
        assert isinstance(form, Packed)
        found = _read_packed(form, layer, tensors, num_inputs)
    if not bool(found.scales.isfinite().all()):
        raise CheckpointError(f"{layer} has scales that are not finite: download it again")
    return found


def _read_gptq(form: Gptq, layer: str, tensors: Tensors, num_inputs: int) -> StoredMatrix:
    groups = tensors["g_idx"]
    order = groups.argsort(stable=True)
    if not torch.equal(groups[order], torch.arange(num_inputs, dtype=torch.int32) // (form.group_size or num_inputs)):
        raise CheckpointError(f"{layer}.g_idx does not give each group its inputs: download it again")
    if not form.is_ordered and not torch.equal(order, torch.arange(num_inputs)):
        raise CheckpointError(f"{layer}.g_idx has its inputs in another order, and config.json no desc_act")
    numbers = _nibbles(tensors["qweight"].T)  # [N, K]
    if form.is_ordered:
        numbers = numbers.index_select(1, order)
    zeros = _nibbles(tensors["qzeros"]).T + (form.zero_shift - _MIDDLE)  # [N, G]
    if form.is_symmetric and bool(zeros.any()):
        raise CheckpointError(f"{layer}.qzeros has other zeros than config.json's sym means: download both again")
    return StoredMatrix(
        numbers - _MIDDLE, tensors["scales"].T, None if form.is_symmetric else zeros, order if form.is_ordered else None
    )


def _read_awq(tensors: Tensors) -> StoredMatrix:
    numbers, zeros = (_in_order(_nibbles(tensors[name])).T - _MIDDLE for name in ("qweight", "qzeros"))
    return StoredMatrix(numbers, tensors["scales"].T, zeros)


def _read_packed(form: Packed, layer: str, tensors: Tensors, num_inputs: int) -> StoredMatrix:
    words, scales = tensors["weight_packed"], tensors["weight_scale"]
    shape = [len(words), num_inputs]
    if tensors["weight_shape"].tolist() != shape:
        raise CheckpointError(
            f"{layer}.weight_shape is {tensors['weight_shape'].tolist()}, config.json implies {shape}: weights and "
            "config belong to different models"
        )
    if form.num_bits == 8:
        return StoredMatrix((words.view(torch.uint8)[:, :num_inputs] ^ 128).view(torch.int8), scales, None)
    zeros = None if form.is_symmetric else _nibbles(tensors["weight_zero_point"].T).T - _MIDDLE
    return StoredMatrix(_nibbles(words)[:, :num_inputs] - _MIDDLE, scales, zeros)


def _in_order(numbers: Tensor) -> Tensor:
    """[M, N], eight outputs as they lie in an int32 -> the same in their own order."""
    return numbers.view(len(numbers), -1, 8)[:, :, _OUTPUTS].flatten(1)


def _nibbles(words: Tensor) -> Tensor:
    """[M, W] int32 -> [M, 8 W] int8, each from 0 to 15, the lowest bits first."""
    # A column counts as contiguous whatever its stride, and then has no view as bytes.
    pairs = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1).view(torch.int8)
