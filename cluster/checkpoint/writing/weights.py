"""Writes safetensors files tensor by tensor: their sizes are known before their contents.

Source: the format as safetensors' README gives it: 8 bytes of length, a JSON header, the tensors one after another.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import BinaryIO

import torch
from torch import Tensor

from cluster.checkpoint.weights import ITEM_BYTES
from cluster.checkpoint.writing.folder import NewFolder
from cluster.config.architectures.architecture import Shapes
from cluster.errors import CheckpointError

BATCH_BYTES = 64 << 20  # of small tensors that are made together
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

Fill = Callable[[Mapping[str, Tensor]], None]
"""Fills tensors, by their published names."""


def write_weights(
    folder: NewFolder,
    files: Mapping[str, Shapes],
    dtype: torch.dtype,
    fill: Fill,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes the tensors of `files` (`parts.split`) in their order, contents from `fill`.

    Holds BATCH_BYTES of them, or one tensor where that is larger. progress: called with bytes written since.
    Raises ClusterError where writing fails, CheckpointError for numbers that float16 does not have.
    """
    for name, shapes in files.items():
        with folder.create(name) as file:
            file.write(_header(shapes, dtype))
            for batch in _batches(shapes, dtype):
                tensors = {key: torch.empty(shape, dtype=dtype) for key, shape in batch.items()}
                fill(tensors)
                for key, tensor in tensors.items():
                    _write(file, key, tensor)
                if progress is not None:
                    progress(sum(tensor.nbytes for tensor in tensors.values()))


def _batches(shapes: Shapes, dtype: torch.dtype) -> list[Shapes]:
    batches: list[Shapes] = []
    room = 0
    for name, shape in shapes.items():
        num_bytes = math.prod(shape) * dtype.itemsize
        if not batches or num_bytes > room:
            batches.append({})
            room = BATCH_BYTES
        batches[-1][name] = shape
        room -= num_bytes
    return batches


def _header(shapes: Shapes, dtype: torch.dtype) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, shape in shapes.items():
        end = begin + math.prod(shape) * ITEM_BYTES[_NAMES[dtype]]
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return len(text).to_bytes(8, "little") + text


def _write(file: BinaryIO, name: str, tensor: Tensor) -> None:
    if tensor.dtype == torch.float16 and not torch.isfinite(tensor).all():
        raise CheckpointError(f"{name} has numbers that float16 does not have (65504 at most): use bfloat16 or float32")
    file.write(tensor.view(torch.uint8).numpy().data)
