"""Writes a whole checkpoint: its weights, then the small files, config.json and the index last."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.checkpoint.reader import CONFIG_FILE, INDEX_FILE
from cluster.checkpoint.writing.folder import NewFolder
from cluster.checkpoint.writing.parts import index_of, size, split
from cluster.checkpoint.writing.published import copy_small_files, write_json
from cluster.checkpoint.writing.weights import Fill, write_weights
from cluster.config import DTYPE_BYTES, DTYPES
from cluster.config.architectures.architecture import Shapes
from cluster.errors import SetupError

MAX_FILE_BYTES = 5_000_000_000

Progress = Callable[[int, int], None]
"""Called with bytes written, and bytes in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewModel:
    """A checkpoint to be written.

    raw_config: for config.json.  shapes: of its tensors, in the order in which they are to lie.  dtype: of them all.
    fill: makes them.  source: the folder whose tokenizer and other small files it takes over.
    """

    raw_config: Mapping[str, Any]
    shapes: Shapes
    dtype: str
    fill: Fill
    source: Path


@dataclass(frozen=True, slots=True)
class Written:
    """A checkpoint that lies on the disk."""

    path: Path
    num_files: int
    num_bytes: int
    dtype: str


def check_dtype(dtype: str) -> None:
    """Raises SetupError for one in which no checkpoint is written."""
    if dtype not in ("auto", *DTYPES):
        raise SetupError(f"dtype is {dtype!r}, one of auto, {', '.join(DTYPES)} is needed")


def write_model(
    target: Path, model: NewModel, *, max_file_bytes: int = MAX_FILE_BYTES, progress: Progress | None = None
) -> Written:
    """Writes into a new or an empty folder, which looks whole only once it is.

    Raises SetupError before anything is written; ClusterError where writing fails.
    """
    if max_file_bytes < 1:
        raise SetupError(f"the largest file is to have {max_file_bytes} bytes: at least 1 is needed")
    itemsize = DTYPE_BYTES[model.dtype]
    files, total = split(model.shapes, itemsize, max_file_bytes), size(model.shapes, itemsize)
    written = 0

    def count(num_bytes: int) -> None:
        nonlocal written
        written += num_bytes
        if progress is not None:
            progress(written, total)

    with NewFolder(target) as folder:
        folder.check_room(total)
        write_weights(folder, files, getattr(torch, model.dtype), model.fill, count)
        copy_small_files(model.source, folder)
        write_json(folder, CONFIG_FILE, model.raw_config)
        if len(files) > 1:
            write_json(folder, INDEX_FILE, index_of(files, total))
        folder.finish()
    return Written(target, len(files), total, model.dtype)
