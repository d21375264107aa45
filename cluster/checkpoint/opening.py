"""Opens a checkpoint's directory, in whatever form its weights are."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from cluster.checkpoint.made.drawn import DrawnCheckpoint, has_seed
from cluster.checkpoint.reader import CheckpointReader
from cluster.config import ModelConfig


class Checkpoint(Protocol):
    """A model's config and its tensors, which several threads may load at once."""

    model_dir: Path
    config: ModelConfig

    def check_names(self) -> None:
        """Compares the tensors' names with those that the config implies; reads no file. Raises CheckpointError."""

    def check_tensors(self) -> None:
        """As `check_names`, and shapes and dtypes as well; reads no tensor. Raises CheckpointError."""

    def load(self, targets: Mapping[str, Tensor], progress: Callable[[int], None] | None = None) -> int:
        """Fills each named tensor's destination; returns bytes read. progress: called with each tensor's bytes.

        Raises CheckpointError.
        """


def open_checkpoint(model_dir: str | Path, rope_scaling: Mapping[str, Any] | None = None) -> Checkpoint:
    """Reads JSON, and headers where there is no index; no tensor. Raises CheckpointError for what cannot be served.

    rope_scaling: in place of the config's, as of `EngineConfig`.
    """
    if has_seed(model_dir):
        return DrawnCheckpoint(model_dir, rope_scaling)
    return CheckpointReader(model_dir, rope_scaling)
