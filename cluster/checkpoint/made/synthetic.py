"""Writes checkpoints with random weights in the published format: benchmarks and tests need no download.

Knows names and shapes from `names.py`; the reader sees no difference to a trained model.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from cluster.checkpoint.names import checkpoint_shapes
from cluster.checkpoint.reader import CONFIG_FILE, INDEX_FILE
from cluster.checkpoint.writing.parts import index_of, size, split
from cluster.config import DTYPE_BYTES, DTYPES, read_model_config
from cluster.config.resources import available_cpus
from cluster.errors import CheckpointError

NORM_SPREAD = 0.1  # norm weights are 1 ± this: a model that forgets to multiply by them is found out

_MAX_FILE_BYTES = 1 << 30
_DRAWS = 1 << 18  # 16-bit draws at a time: they and the quantiles stay in a core's L2 cache


def write_checkpoint(
    model_dir: str | Path,
    raw_config: Mapping[str, Any],
    *,
    seed: int,
    max_file_bytes: int = _MAX_FILE_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes config.json (`raw_config` as it is) and safetensors files, with an index if there are several.

    Weights and biases are normal with the config's `initializer_range` as deviation, norm weights
    1 ± NORM_SPREAD, all in the config's dtype. A tensor depends on `seed` and its name only.
    Holds one file's tensors in memory (`max_file_bytes`, or one tensor where that is larger).
    progress: called with bytes made and bytes in all.
    Makes the directory. Raises CheckpointError where it has weights already, or where writing fails.
    """
    model_dir = Path(model_dir)
    config = read_model_config(raw_config)
    if config.dtype not in DTYPES:
        raise CheckpointError(f"random weights of {config.dtype} are not made: use one of {', '.join(DTYPES)}")
    shapes = checkpoint_shapes(config)
    itemsize = DTYPE_BYTES[config.dtype]
    total_bytes = size(shapes, itemsize)
    files = split(shapes, itemsize, max_file_bytes)
    generator = _Generator.of(seed, float(raw_config.get("initializer_range", 0.02)), config.dtype)
    try:
        model_dir.mkdir(parents=True, exist_ok=True)
        if any(model_dir.glob("*.safetensors")):
            raise CheckpointError(f"{model_dir} holds weights already: empty it or choose another directory")
        write_json(model_dir / CONFIG_FILE, raw_config)
        made_bytes = 0
        with ThreadPoolExecutor(max_workers=available_cpus()) as pool:
            for file_name, names in files.items():
                tensors: dict[str, Tensor] = {}
                for name, tensor in zip(names, pool.map(generator.tensor, names, names.values()), strict=True):
                    tensors[name] = tensor
                    made_bytes += tensor.nbytes
                    if progress is not None:
                        progress(made_bytes, total_bytes)
                save_file(tensors, model_dir / file_name, metadata={"format": "pt"})
                # safetensors 0.8 leaves files that only their owner can read.
                shutil.copymode(model_dir / CONFIG_FILE, model_dir / file_name)
        if len(files) > 1:
            write_json(model_dir / INDEX_FILE, index_of(files, total_bytes))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{model_dir}: writing {total_bytes:,} bytes failed: {error}") from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes one JSON file as the published ones are laid out."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass(frozen=True, slots=True)
class _Generator:
    """Makes tensors; may be called from several threads.

    Each element is one of 65,536 equally likely quantiles of its normal distribution (at most 4.2 deviations
    off), drawn by 16 random bits straight into the target's dtype: 0.8 GB/s of bfloat16 a core, torch's
    `normal_` 0.2.

    weights, norms: [65536] the quantiles' bit patterns, int16 or int32.
    """

    seed: int
    dtype: torch.dtype
    weights: NDArray[Any]
    norms: NDArray[Any]

    @classmethod
    def of(cls, seed: int, deviation: float, dtype_name: str) -> "_Generator":
        dtype: torch.dtype = getattr(torch, dtype_name)
        bits = torch.int16 if dtype.itemsize == 2 else torch.int32
        normal = torch.special.ndtri((torch.arange(65536, dtype=torch.float64) + 0.5) / 65536)
        weights, norms = normal * deviation, 1 + normal * NORM_SPREAD
        return cls(seed, dtype, weights.to(dtype).view(bits).numpy(), norms.to(dtype).view(bits).numpy())

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        quantiles = self.norms if name.endswith("norm.weight") else self.weights
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        random = np.random.Generator(np.random.SFC64(int.from_bytes(digest)))
        values = np.empty(math.prod(shape), dtype=quantiles.dtype)
        for start in range(0, len(values), _DRAWS):
            part = values[start : start + _DRAWS]
            words = random.integers(0, 1 << 64, size=-(-len(part) // 4), dtype=np.uint64)
            part[:] = quantiles[words.view(np.uint16)[: len(part)]]
        return torch.from_numpy(values).view(self.dtype).view(shape)
