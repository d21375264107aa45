"""The part of each stored tensor that a rank reads (`cluster/config/tensor_parallel.py`). Reads no files."""

from cluster.checkpoint.names import dense_shapes
from cluster.config import ModelConfig
from cluster.config.quantization import QUANTIZATIONS, Quantization
from cluster.config.tensor_parallel import FIELD, Share, Span, shares_of
from cluster.errors import SetupError

_OTHERS = ("int4", "int4-64", "int4-32", "int8")  # to name in place of one whose groups do not fit

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


def check_groups(config: ModelConfig, quantization: str, size: int) -> None:
    """Raises SetupError where a rank's inputs of a matrix would begin inside a group that shares a scale.

    quantization: PLAIN, or of QUANTIZATIONS. size: of the ranks, as many as `check_ranks` allows.
    """
    rounded = config.stored or QUANTIZATIONS.get(quantization)
    found = None if rounded is None else _inside_group(config, rounded, size)
    if rounded is None or found is None:
        return
    name, first = found
    whose, of = f"quantization {quantization!r}", ""
    if rounded.form is not None:
        whose, of = rounded.form.title, " of the checkpoint in 16 bits"
    ranks = [str(num) for num in range(1, size) if _inside_group(config, rounded, num) is None]
    others = [other for other in _OTHERS if _inside_group(config, QUANTIZATIONS[other], size) is None]
    raise SetupError(
        f"{FIELD} is {size}: a rank's part of {name} would begin at input {first}, inside a group of "
        f"{rounded.inputs_together} ({whose}): use {' or '.join(ranks)} rank{'s' if ranks[1:] else ''}, or "
        f"quantization {' or '.join(others)}{of}"
    )


def _inside_group(config: ModelConfig, rounded: Quantization, size: int) -> tuple[str, int] | None:
    """The first matrix that cannot be cut, and where."""
    for share in shares_of(config, size):
        for name, span in spans_of(share, config).items():
            if span.dim == 1 and rounded.takes(name.removesuffix(".weight")) and span.first % rounded.inputs_together:
                return name, span.first
    return None
