"""The part of each stored tensor that a rank reads (`cluster/config/tensor_parallel.py`). Reads no files."""

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.checkpoint.names import dense_shapes
from cluster.config import ModelConfig
from cluster.config.tensor_parallel import Share

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """Of a tensor's `total` rows (dim 0) or columns (dim 1) those from `first` on, as many as are wanted."""

    dim: int
    first: int
    total: int

    def whole(self, part: Shape) -> Shape:
        """The stored tensor's shape."""
        return (*part[: self.dim], self.total, *part[self.dim + 1 :])

    def index(self, part: Shape) -> tuple[slice, ...]:
        return (*(slice(None) for _ in range(self.dim)), slice(self.first, self.first + part[self.dim]))


Spans = Mapping[str, Span]
"""By the tensor's name; of those that are read in part alone."""

Cut = tuple[slice, slice]
"""The rows and the columns of a matrix that a rank has."""


def spans_of(share: Share, config: ModelConfig) -> dict[str, Span]:
    """config: of the whole model."""
    found, shapes = {}, dense_shapes(config)
    for name, part in dense_shapes(share.config).items():
        cut = [dim for dim, (size, total) in enumerate(zip(part, shapes[name], strict=True)) if size != total]
        if cut:
            [dim] = cut
            found[name] = Span(dim, _first(name, share), shapes[name][dim])
    return found


def cuts_of(share: Share, config: ModelConfig) -> dict[str, Cut]:
    """Of the matrices that a rank has a part of. config: of the whole model."""
    found, shapes = {}, dense_shapes(share.config)
    for name, span in spans_of(share, config).items():
        if len(shapes[name]) == 2:
            rows, columns = (*span.index(shapes[name]), slice(None))[:2]
            found[name] = rows, columns
    return found


def _first(name: str, share: Share) -> int:
    layer = name.rpartition(".")[0]
    match layer.rpartition(".")[2]:
        case "q_proj" | "o_proj":
            return share.heads.start * share.config.head_dim
        case "k_proj" | "v_proj":
            return share.kv_heads.start * share.config.head_dim
        case "gate_proj" | "up_proj" | "down_proj":
            return (share.shared_inner if ".shared_expert." in name else share.inner).start
        case "embed_tokens" | "lm_head":
            return share.tokens.start
    raise AssertionError(f"{name} is not divided among ranks")
