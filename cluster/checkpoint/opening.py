"""Opens a checkpoint by its directory or its name, in whatever form its weights are."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cluster.checkpoint.made.drawn import DrawnCheckpoint, has_seed
from cluster.checkpoint.model_files import open_files
from cluster.checkpoint.names import checkpoint_shapes
from cluster.checkpoint.reader import CheckpointReader
from cluster.config import ModelConfig
from cluster.config.tensor_parallel import Spans
from cluster.errors import CheckpointError

if TYPE_CHECKING:  # whoever only describes a checkpoint does without torch
    from torch import Tensor


class Checkpoint(Protocol):
    """A model's config and its tensors, which several threads may load at once.

    model_dir: has all files but those with tensors, which may be elsewhere.
    """

    model_dir: Path
    config: ModelConfig

    def check_names(self) -> None:
        """Compares the tensors' names with those that the config implies; reads no file. Raises CheckpointError."""

    def check_tensors(self) -> None:
        """As `check_names`, and shapes and dtypes as well; reads no tensor. Raises CheckpointError."""

    def missing_bytes(self, names: Collection[str]) -> int:
        """Bytes that `fetch` would download; 0 where all files are here."""

    def fetch(self, names: Collection[str], progress: Callable[[int], None] | None = None) -> None:
        """Downloads the files with these tensors. progress: called with each piece's bytes. Raises CheckpointError."""

    def check_room(self) -> None:
        """Raises CheckpointError where files that are elsewhere would not find room here."""

    def load(
        self,
        targets: "Mapping[str, Tensor]",
        progress: Callable[[int], None] | None = None,
        spans: Spans | None = None,
    ) -> int:
        """Fills each named tensor's destination; returns bytes read. progress: called with each tensor's bytes.
        spans: of the tensors of which only a part is wanted.

        Raises CheckpointError.
        """


def open_checkpoint(model: str | Path, rope_scaling: Mapping[str, Any] | None = None) -> Checkpoint:
    """Reads JSON, and headers where there is no index; no tensor. Raises CheckpointError for what cannot be served.

    model: a directory, or a name on the hub.  rope_scaling: in place of the config's, as of `EngineConfig`.
    """
    files = open_files(model)
    if has_seed(files.directory):
        return DrawnCheckpoint(files.directory, rope_scaling)
    return CheckpointReader(files.directory, rope_scaling, files)


def open_pickled(model: str | Path) -> Checkpoint:
    """As `open_checkpoint`, of weights that are pickled: only where a user asks for it."""
    from cluster.checkpoint.pickled import PICKLES

    files = open_files(model)
    return CheckpointReader(files.directory, files=files, weights=PICKLES)


def bring_here(checkpoint: Checkpoint) -> None:
    """Fetches what is elsewhere, and checks all of it. Raises CheckpointError, also for weights that are rounded."""
    if checkpoint.config.stored is not None:
        raise CheckpointError(f"{checkpoint.model_dir} has its weights rounded: give the one in 16 bits")
    checkpoint.check_names()
    checkpoint.fetch(checkpoint_shapes(checkpoint.config))
    checkpoint.check_tensors()
