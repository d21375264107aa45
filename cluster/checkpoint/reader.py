"""Reads a checkpoint's directory: its config, its index, and only the tensors that are asked for.

Knows nothing of modules or devices: `model/` and `experts/` allocate what they want to have filled.
"""

import json
import math
import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cluster.checkpoint.names import checkpoint_shapes
from cluster.config import ModelConfig
from cluster.errors import CheckpointError

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

# In config.json, a seed: there are no weight files, random weights are drawn where they are wanted (for benches).
RANDOM_WEIGHTS = "moe_cluster_random_weights"
_ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}


class CheckpointReader:
    """A `qwen2_moe` directory as published: config.json and safetensors files.

    names: of all tensors, from the index, or from the one file's header.

    Opening reads JSON and at most one header, no tensor. Several threads may load at once.
    Raises CheckpointError for a directory that cannot be served.
    """

    def __init__(self, model_dir: str | Path) -> None:
        self.model_dir = Path(model_dir)
        if not self.model_dir.is_dir():
            raise CheckpointError(
                f"{self.model_dir} is not a directory: give the one that holds the checkpoint's {CONFIG_FILE}"
            )
        raw = read_json_object(self.model_dir / CONFIG_FILE)
        try:
            self.config = ModelConfig.from_dict(raw)
        except CheckpointError as error:
            raise CheckpointError(f"{self.model_dir}: {error}") from error
        self._seed: int | None = raw.get(RANDOM_WEIGHTS)
        self._files = _locate_tensors(self.model_dir) if self._seed is None else {}
        self.names: frozenset[str] = frozenset(self._files or checkpoint_shapes(self.config))

    def check_names(self) -> None:
        """Compares the tensors' names with those that the config implies; reads no file.

        `lm_head.weight` beside tied embeddings and the `inv_freq` buffers of old exports are let pass.
        Raises CheckpointError that names the first missing and the first superfluous ones.
        """
        expected = checkpoint_shapes(self.config).keys()
        missing = [name for name in expected if name not in self.names]
        extra = sorted(name for name in self.names - expected if not self._is_ignored(name))
        if missing or extra:
            faults = [f"{_some(missing, 'is', 'are')} missing"] if missing else []
            faults += [f"{_some(extra, 'is', 'are')} not expected"] if extra else []
            raise CheckpointError(
                f"{self.model_dir}: tensors do not match {CONFIG_FILE}: {'; '.join(faults)}: "
                "download the checkpoint again, or put the config beside it that belongs to it"
            )

    def load(self, targets: Mapping[str, Tensor], progress: Callable[[int], None] | None = None) -> int:
        """Copies each named tensor into its destination, cast to the destination's dtype; returns bytes read.

        Mutates the destinations, which may be views and may lie on CUDA; after an error some are filled.
        progress: called after each tensor with its bytes on disk.
        Files are mapped, each once and only those that hold a wanted tensor, and read in the order of their
        offsets. On the CPU nothing is allocated beside the destinations, cast or not (measured: RssAnon stays
        while 32 MB tensors are copied); RssFile grows by one file's wanted tensors, which are page cache, and
        falls when the file is closed.
        Raises CheckpointError, naming the tensor, for one that is absent, misshapen or of an unserved dtype.
        """
        absent = [name for name in targets if name not in self.names]
        if absent:
            raise CheckpointError(
                f"{self.model_dir}: {_some(absent, 'is', 'are')} not in the checkpoint: download it again"
            )
        if self._seed is not None:
            return _draw(self._seed, targets, progress)
        names_of_file: dict[Path, set[str]] = {}
        for name in targets:
            names_of_file.setdefault(self._files[name], set()).add(name)
        num_bytes = 0
        for path, names in sorted(names_of_file.items()):
            with _open_weights(path) as file:
                ordered = [name for name in file.offset_keys() if name in names]
                if len(ordered) < len(names):
                    absent = sorted(names.difference(ordered))
                    raise CheckpointError(
                        f"{path}: {_some(absent, 'is', 'are')} not in this file, but {INDEX_FILE} says so: "
                        "download both again"
                    )
                for name in ordered:
                    tensor_bytes = _copy_tensor(path, file, name, targets[name])
                    num_bytes += tensor_bytes
                    if progress is not None:
                        progress(tensor_bytes)
        return num_bytes

    def _is_ignored(self, name: str) -> bool:
        tied_head = name == "lm_head.weight" and self.config.tie_word_embeddings
        return tied_head or name.endswith(".rotary_emb.inv_freq")


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a file that holds one JSON object. Raises CheckpointError for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: the checkpoint's directory must hold it") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, an object is needed")
    return value


def _locate_tensors(model_dir: Path) -> dict[str, Path]:
    """Which file holds which tensor. A single file goes before an index, as in transformers."""
    single = model_dir / SINGLE_FILE
    if single.exists():
        with _open_weights(single) as file:
            return dict.fromkeys(file.keys(), single)
    index = model_dir / INDEX_FILE
    if not index.exists():
        raise CheckpointError(
            f"{model_dir} has neither {SINGLE_FILE} nor {INDEX_FILE}: only safetensors weights are read"
        )
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is missing or empty: download it again")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or not file_name or Path(file_name).name != file_name:
            raise CheckpointError(
                f"{index}: weight_map gives {file_name!r} for {name}, a name without a directory is needed"
            )
    absent = sorted(name for name in set(weight_map.values()) if not (model_dir / name).is_file())
    if absent:
        raise CheckpointError(
            f"{index} names {_some(absent, 'which is', 'which are')} not there: download the missing files"
        )
    return {name: model_dir / file_name for name, file_name in weight_map.items()}


def _open_weights(path: Path) -> Any:
    """Maps one file, a `safe_open` (whose methods have no annotations). A truncated file fails here."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: download it again") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a complete safetensors file ({error}): download it again") from error


def _draw(seed: int, targets: Mapping[str, Tensor], progress: Callable[[int], None] | None) -> int:
    """Fills each destination on its own device from the seed and its name. Returns their bytes."""
    for name, target in targets.items():
        generator = torch.Generator(target.device).manual_seed(seed ^ zlib.crc32(name.encode()))
        with torch.no_grad():
            target.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.02, generator=generator)
        if progress is not None:
            progress(target.nbytes)
    return sum(target.nbytes for target in targets.values())


def _copy_tensor(path: Path, file: Any, name: str, destination: Tensor) -> int:
    """Returns the tensor's bytes on disk. Mutates `destination`."""
    header = file.get_slice(name)
    dtype: str = header.get_dtype()
    if dtype not in _ITEM_BYTES:
        raise CheckpointError(
            f"{path}: {name} has dtype {dtype}, {', '.join(_ITEM_BYTES)} are served: use the bfloat16 checkpoint"
        )
    found: tuple[int, ...] = tuple(header.get_shape())
    expected = tuple(destination.shape)
    if found != expected:
        raise CheckpointError(
            f"{path}: {name} has shape {list(found)}, {CONFIG_FILE} implies {list(expected)}: "
            "weights and config belong to different models"
        )
    with torch.no_grad():
        destination.copy_(file.get_tensor(name))
    return math.prod(found) * _ITEM_BYTES[dtype]


def _some(names: Collection[str], singular: str, plural: str, limit: int = 3) -> str:
    """ "a, b, c and 5 more are", for messages."""
    shown = ", ".join(list(names)[:limit])
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{shown}{more} {singular if len(names) == 1 else plural}"
