"""Names the ways in which weights can be rounded while they are loaded, and how their rows lie. Knows no tensors.

A checkpoint may have them rounded already (`stored.py`)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from cluster.config.stored import GROUP_SIZES, KEY, StoredForm
from cluster.errors import SetupError

PLAIN = "none"  # weights as the checkpoint has them
_KEPT = ("embed_tokens", "gate", "shared_expert_gate", "score", "qa_outputs")
CHUNK_INPUTS = {8: 64, 4: 128}  # in 64 bytes, by the bits of each
HEAD_BYTES, _ALIGNMENT = 8, 16
NF4_BLOCK, NF4_NESTED = 64, 256  # weights that share a scale, and scales that share one: QLoRA, section 3


@dataclass(frozen=True, slots=True)
class RowLayout:
    """Where the bytes of a row lie. group_size: 0 with 8 bits for one scale a row.  is_nf4: 4 bits are levels, with
    scales that are rounded themselves, and group_size is NF4_BLOCK."""

    num_bits: int
    num_inputs: int
    group_size: int = 0
    has_zeros: bool = False
    is_nf4: bool = False

    @property
    def form(self) -> int:
        """As the kernels know it: `Form` of native/kernels.h."""
        if self.num_bits == 8:
            return 9 if self.group_size else 8
        return 5 if self.is_nf4 else 4

    @property
    def num_chunks(self) -> int:
        return -(-self.num_inputs // CHUNK_INPUTS[self.num_bits])

    @property
    def num_groups(self) -> int:
        """That have a scale, those past the inputs included: as many as 16 sums of 32 inputs make full."""
        if not self.group_size:
            return 0
        if self.num_bits == 8:
            return 2 * self.num_chunks * 32 // self.group_size + 1
        return -(-4 * self.num_chunks // 16) * 16 * 32 // self.group_size

    @property
    def num_nested(self) -> int:
        """Scales of a row's scales in nf4: its blocks may begin in any of those of one."""
        return -(-2 * self.num_chunks // NF4_NESTED) + 1

    @property
    def weights_at(self) -> int:
        end = HEAD_BYTES + self.num_groups * (3 if self.has_zeros else 2)
        if self.is_nf4:
            end = HEAD_BYTES + 4 * (1 + self.num_nested) + 2 * self.num_chunks
        return -(-end // _ALIGNMENT) * _ALIGNMENT

    @property
    def row_bytes(self) -> int:
        return self.weights_at + 64 * self.num_chunks


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """Rounds the weights of attention, dense layers and experts. The router and the gate of the shared
    expert stay as they are, and so do embeddings and, unless asked for, the last layer.

    num_bits: 8 with a scale a row, or one a group of group_size inputs as 4 have.  is_nf4: as of RowLayout.
    form: in which a checkpoint has them so; None where they are rounded here.  experts: whether routed ones are, too.
    """

    num_bits: int
    group_size: int = 0
    has_zeros: bool = False
    lm_head: bool = False
    is_nf4: bool = False
    form: StoredForm | None = None
    experts: bool = True

    def takes(self, layer: str) -> bool:
        """Whether it is meant for the linear layer of this name, with all its dots."""
        name = layer.rpartition(".")[2]
        if name in _KEPT or (name == "lm_head" and not self.lm_head):
            return False
        return self.form is None or self.form.takes(layer)

    @property
    def is_ordered(self) -> bool:
        """Whether each matrix has an order of inputs of its own."""
        return self.form is not None and self.form.is_ordered

    def needs_whole(self, dim: int) -> bool:
        """Whether a part of a matrix, of its outputs (dim 0) or inputs (dim 1), has scales of numbers beside it."""
        return dim == 1 or self.is_nf4 or self.form is not None

    @property
    def inputs_together(self) -> int:
        """Inputs that share a scale, and cannot be divided; 1 where all of an output have one."""
        is_of_all = self.form is not None and not self.form.group_size
        return 1 if is_of_all else max(1, self.group_size)

    def with_experts(self, experts: bool) -> "Quantization":
        return replace(self, experts=experts)

    def layout(self, num_inputs: int) -> RowLayout:
        return RowLayout(self.num_bits, num_inputs, self.group_size, self.has_zeros, self.is_nf4)

    def matrix_bytes(self, num_outputs: int, num_inputs: int) -> int:
        """Of one matrix, the order of its inputs included, 32 bits each."""
        return num_outputs * self.layout(num_inputs).row_bytes + (4 * num_inputs if self.is_ordered else 0)


def _named() -> dict[str, Quantization]:
    forms = {"int8": Quantization(num_bits=8), "int4": Quantization(num_bits=4, group_size=128)}
    for size in GROUP_SIZES:
        forms[f"int4-{size}"] = Quantization(num_bits=4, group_size=size)
        forms[f"int4-{size}-zeros"] = Quantization(num_bits=4, group_size=size, has_zeros=True)
    forms["nf4"] = Quantization(num_bits=4, group_size=NF4_BLOCK, is_nf4=True)
    return forms | {f"{name}+lm_head": replace(form, lm_head=True) for name, form in forms.items()}


# int8; int4, with groups of 128, or int4-SIZE; `-zeros` where they are not symmetric; nf4; all with `+lm_head` too, for
# the last layer
QUANTIZATIONS: Mapping[str, Quantization] = MappingProxyType(_named())


def stored_quantization(form: StoredForm) -> Quantization:
    """That of a checkpoint's weights. One scale for all inputs of an output is, in 4 bits, the same for each 128."""
    group_size = (form.group_size or 128) if form.num_bits == 4 else form.group_size
    return Quantization(
        num_bits=form.num_bits, group_size=group_size, has_zeros=not form.is_symmetric, lm_head=form.takes("lm_head"),
        form=form,
    )  # fmt: skip


def quantization_of(name: str, stored: Quantization | None = None) -> Quantization | None:
    """The one of a name, None for PLAIN. stored: the checkpoint's, which no other may be put upon: SetupError."""
    check_stored(name, stored)
    if name == PLAIN:
        return stored
    return QUANTIZATIONS[name]


def check_stored(name: str, stored: Quantization | None) -> None:
    """Raises SetupError where weights that are rounded already are to be rounded again."""
    if stored is not None and name != PLAIN:
        raise SetupError(
            f"quantization is {name!r}, but the checkpoint has {KEY}: its weights are in {stored.num_bits} bits already"
        )
