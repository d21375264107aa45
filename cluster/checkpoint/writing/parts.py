"""Shares tensors out to files, as published checkpoints have them. Writes nothing."""

import math
from collections.abc import Mapping
from typing import Any

from cluster.checkpoint.weights import SINGLE_FILE
from cluster.config.architectures.architecture import Shapes


def split(shapes: Shapes, itemsize: int, max_file_bytes: int) -> dict[str, Shapes]:
    """Fills files in order up to `max_file_bytes`; a tensor that is larger has a file of its own."""
    files: list[Shapes] = [{}]
    room = max_file_bytes
    for name, shape in shapes.items():
        num_bytes = math.prod(shape) * itemsize
        if files[-1] and num_bytes > room:
            files.append({})
            room = max_file_bytes
        files[-1][name] = shape
        room -= num_bytes
    if len(files) == 1:
        return {SINGLE_FILE: files[0]}
    return {f"model-{i:05d}-of-{len(files):05d}.safetensors": part for i, part in enumerate(files, start=1)}


def size(shapes: Shapes, itemsize: int) -> int:
    """Bytes of all tensors."""
    return sum(math.prod(shape) for shape in shapes.values()) * itemsize


def index_of(files: Mapping[str, Shapes], num_bytes: int) -> dict[str, Any]:
    """The content of the index of several files."""
    weight_map = {name: file_name for file_name, names in files.items() for name in names}
    return {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
