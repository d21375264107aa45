"""A layer's experts in two tensors, as transformers 5 can write them: names, shapes, orientation. Reads no files.

gate_up_proj: [E, 2I, H], gate above up; down_proj: [E, H, I]. Models of transformers whose experts multiply from the
other side store [E, H, 2I] and [E, I, H] (`is_transposed` there): both are found here, by their shapes.
E experts, H hidden, I an expert's inner size.
"""

import re
from dataclasses import dataclass

GATE_UP, DOWN = "gate_up_proj", "down_proj"
_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a tensor lies: the stored tensor's name, and of a fused one its expert, and which half of [2I, H]."""

    name: str
    expert_id: int | None = None
    half: int | None = None


def fused_source(name: str) -> Source | None:
    """Where an expert's matrix lies among fused ones; None for another tensor."""
    expert = _EXPERT.fullmatch(name)
    if expert is None:
        return None
    fused = DOWN if expert[3] == "down" else GATE_UP
    return Source(f"{expert[1]}.{fused}", int(expert[2]), {"gate": 0, "up": 1, "down": None}[expert[3]])


def fused_shape(source: Source, shape: Shape, num_experts: int) -> Shape:
    """The fused tensor's shape. shape: of the expert's matrix."""
    rows = shape[0] if source.half is None else 2 * shape[0]
    return (num_experts, rows, *shape[1:])


def is_fused(name: str) -> bool:
    return name.endswith((f".mlp.experts.{GATE_UP}", f".mlp.experts.{DOWN}"))


def partner_of(name: str) -> str:
    """The layer's other fused tensor."""
    stem, _, last = name.rpartition(".")
    return f"{stem}.{DOWN if last == GATE_UP else GATE_UP}"


def lies_transposed(shape: Shape, found: Shape, partner: Shape | None) -> bool:
    """Whether a fused tensor has inputs before outputs.

    shape: by the config, [E, outputs, inputs].  found: the stored one.  partner: of the layer's other fused tensor,
    which tells where this one is square: as long as that lies as the config says, it has more outputs than inputs (of
    a square gate_up_proj 2I = H, so H > I; of a square down_proj I = H, so 2I > H).
    """
    if len(shape) != 3 or shape[1] != shape[2]:
        return found == transposed(shape) != shape
    return partner is not None and len(partner) == 3 and partner[1] < partner[2]


def transposed(shape: Shape) -> Shape:
    """[E, A, B] -> [E, B, A]."""
    return (*shape[:-2], *reversed(shape[-2:]))
