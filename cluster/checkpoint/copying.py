"""Copies one stored tensor, or an expert's part of a fused one, to where it is wanted."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from cluster.checkpoint.files import in_one_line
from cluster.checkpoint.fused import Shape, Source, fused_shape, lies_transposed, transposed
from cluster.checkpoint.weights import ITEM_BYTES, SIZE_BYTES, WORD_BYTES, StoredTensor, check_tensor
from cluster.config.tensor_parallel import Span
from cluster.errors import CheckpointError

PartnerShape = Callable[[str], Shape | None]
"""The stored shape of a layer's other fused tensor."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A tensor in an open file. file: as a `Format` opens it.  name: the stored one."""

    path: Path
    file: Any
    name: str


@dataclass(frozen=True, slots=True)
class _Part:
    """Of a stored tensor. index: () for all of it."""

    stored_shape: Shape
    index: tuple[int | slice, ...] = ()
    is_transposed: bool = False


def copy_tensor(
    stored: StoredFile, source: Source, destination: Tensor, partner_shape: PartnerShape, span: Span | None = None
) -> int:
    """Fills `destination`, in its dtype; returns the bytes read. span: the part to read. Raises CheckpointError."""
    header = stored.file.get_slice(stored.name)
    found = StoredTensor(stored.path, header.get_dtype(), tuple(header.get_shape()))
    shape = tuple(destination.shape)
    part = _Part(shape) if span is None else _Part(span.whole(shape), span.index(shape))
    if source.expert_id is not None:
        part = _part(source, found.shape, destination, partner_shape)
    check_tensor(source.name, found, part.stored_shape)
    try:
        with torch.no_grad():
            read = header[part.index] if part.index else stored.file.get_tensor(stored.name)
            destination.copy_(read.mT if part.is_transposed else read)
    except SafetensorError as error:
        raise CheckpointError(f"{stored.path}: {source.name} cannot be read: {in_one_line(error)}") from error
    return math.prod(destination.shape) * (ITEM_BYTES | WORD_BYTES | SIZE_BYTES)[found.dtype]


def _part(source: Source, found: Shape, destination: Tensor, partner_shape: PartnerShape) -> _Part:
    """An expert's rows of a fused tensor, or its columns where that lies transposed."""
    assert source.expert_id is not None
    rows, num_experts = destination.shape[0], found[0] if found else 0
    shape = fused_shape(source, tuple(destination.shape), max(num_experts, source.expert_id + 1))
    span = slice(None) if source.half is None else slice(source.half * rows, (source.half + 1) * rows)
    if lies_transposed(shape, found, partner_shape(source.name) if shape[1] == shape[2] else None):
        return _Part(transposed(shape), (source.expert_id, slice(None), span), is_transposed=True)
    return _Part(shape, (source.expert_id, span))
