"""A checkpoint without weight files: each process draws the tensors that it wants, on its own device. For benches."""

import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.checkpoint.files import read_json_object
from cluster.checkpoint.names import checkpoint_shapes
from cluster.checkpoint.reader import CONFIG_FILE, read_config
from cluster.config.json_keys import Keys
from cluster.config.tensor_parallel import Spans
from cluster.errors import CheckpointError

if TYPE_CHECKING:  # whoever only describes a checkpoint does without torch
    from torch import Tensor

SEED_KEY = "moe_cluster_random_weights"  # in config.json


class DrawnCheckpoint:
    """Random weights: normal ones with deviation 0.02, norms' around one. A tensor depends on the seed and its name."""

    def __init__(self, model_dir: str | Path, rope_scaling: Mapping[str, Any] | None = None) -> None:
        """Raises CheckpointError."""
        self.model_dir = Path(model_dir)
        raw, self.config = read_config(self.model_dir, rope_scaling)
        self._seed = Keys(raw, f"{self.model_dir}: {CONFIG_FILE}").count(SEED_KEY, at_least=0)
        self._shapes = checkpoint_shapes(self.config)

    def check_names(self) -> None:
        """It has whatever name is asked for."""

    def check_tensors(self) -> None:
        """They have whatever shape is asked for."""

    def missing_bytes(self, names: Collection[str]) -> int:
        return 0

    def fetch(self, names: Collection[str], progress: Callable[[int], None] | None = None) -> None:
        """There is nothing to download."""

    def check_room(self) -> None: ...

    def load(
        self,
        targets: "Mapping[str, Tensor]",
        progress: Callable[[int], None] | None = None,
        spans: Spans | None = None,
    ) -> int:
        """Fills each destination. Returns their bytes. A tensor is drawn whole where only a part of it is wanted."""
        import torch

        from cluster.checkpoint.made.drawn_forms import draw_rounded

        for name, target in targets.items():
            generator = torch.Generator(target.device).manual_seed(self._seed ^ zlib.crc32(name.encode()))
            rounded, layer = self.config.stored, name.rpartition(".")[0]
            with torch.no_grad():
                if rounded is not None and rounded.form is not None and not name.endswith((".weight", ".bias")):
                    draw_rounded(rounded.form, name, target, generator, self._matrix_shape(layer))
                else:
                    span = spans.get(name) if spans else None
                    whole = target if span is None else target.new_empty(span.whole(tuple(target.shape)))
                    whole.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.02, generator=generator)
                    if span is not None:
                        target.copy_(whole[span.index(tuple(target.shape))])
            if progress is not None:
                progress(target.nbytes)
        return sum(target.nbytes for target in targets.values())

    def _matrix_shape(self, layer: str) -> tuple[int, int]:
        num_outputs, num_inputs = self._shapes[f"{layer}.weight"]
        return num_outputs, num_inputs


def has_seed(model_dir: str | Path) -> bool:
    """Whether a config.json asks for drawn weights. One that cannot be read does not."""
    try:
        return read_json_object(Path(model_dir) / CONFIG_FILE).get(SEED_KEY) is not None
    except CheckpointError:
        return False
