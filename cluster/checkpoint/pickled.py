"""Reads weights that lie as torch's pickles: pytorch_model.bin, in parts with an index, or one .pt file.

Never for serving: a pickle is a program. torch's restricted unpickler runs none of it and takes tensors alone, but a
caller must still ask for this. `CheckpointReader(model_dir, weights=PICKLES)` sees no difference to safetensors.
"""

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.checkpoint.files import check_file, in_one_line, some
from cluster.checkpoint.weights import PICKLED, Format, StoredTensor, WeightFiles, find, read_header, read_index
from cluster.errors import CheckpointError

INDEX_FILE, SINGLE_FILE = "pytorch_model.bin.index.json", "pytorch_model.bin"
_OF_TRAINERS = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "training_args.bin")
_NESTED = ("state_dict", "model_state_dict", "model", "module")  # where trainers put a model's tensors
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True, slots=True)
class _Slice:
    """As safetensors' own: a header, and parts by index."""

    tensor: Tensor

    def get_dtype(self) -> str:
        return _DTYPES.get(self.tensor.dtype, str(self.tensor.dtype).removeprefix("torch."))

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def __getitem__(self, index: Any) -> Tensor:
        return self.tensor[index]


@dataclass(frozen=True, slots=True)
class _File:
    """One file's tensors, mapped where the file can be."""

    tensors: Mapping[str, Tensor]

    def keys(self) -> list[str]:
        return list(self.tensors)

    def offset_keys(self) -> list[str]:
        return list(self.tensors)

    def get_tensor(self, name: str) -> Tensor:
        return self.tensors[name]

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self.tensors[name])


def _locate(files: WeightFiles) -> dict[str, Path]:
    """Each tensor's file. A single file goes before an index, as in transformers. Raises CheckpointError."""
    if not files.holds(SINGLE_FILE) and files.holds(INDEX_FILE):
        files.fetch([INDEX_FILE])
        return read_index(files, INDEX_FILE)
    others = set(find(files, _OF_TRAINERS))
    found = [name for name in find(files, PICKLED) if name not in others]
    found = [SINGLE_FILE] if files.holds(SINGLE_FILE) else found
    if len(found) != 1:
        number = some(found, "is one", "are some") if found else "there is none"
        raise CheckpointError(
            f"{files.directory}: {SINGLE_FILE}, {INDEX_FILE} or one .pt or .pth file is read with --from-pickle, and "
            f"{number}"
        )
    return dict.fromkeys(_header(files, found[0]), files.directory / found[0])


def _header(files: WeightFiles, name: str) -> dict[str, StoredTensor]:
    files.fetch([name])
    return read_header(files.directory / name, _open)


@contextmanager
def _open(path: Path) -> Iterator[_File]:
    """Raises CheckpointError for a file that is no pickle of tensors alone."""
    check_file(path)
    yield _File(_tensors(path, _load(path)))


def _load(path: Path) -> Any:
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):  # of torch before 1.6: its files cannot be mapped
                raise
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors, and nothing else is unpickled ({in_one_line(error, 120)}): save the "
            "model's state_dict alone"
        ) from error
    except Exception as error:  # torch has any kind for a damaged file: struct.error, IndexError, …
        raise CheckpointError(
            f"{path} is not a complete file of torch.save ({in_one_line(error, 120)}): download it again"
        ) from error


def _tensors(path: Path, loaded: Any) -> dict[str, Tensor]:
    for key in _NESTED:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    tensors = loaded if isinstance(loaded, Mapping) else {}
    found = {name: value for name, value in tensors.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not found:
        raise CheckpointError(f"{path} holds no tensors by name: the state_dict of a model is needed")
    return found


PICKLES = Format("pickled", _locate, _header, _open)
