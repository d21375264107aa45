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


@dataclass(frozen=True, slots=True)
class RowLayout:
    """Where the bytes of a row lie. group_size, has_zeros: of 4 bits."""

    num_bits: int
    num_inputs: int
    group_size: int = 0
    has_zeros: bool = False

    @property
    def num_chunks(self) -> int:
        return -(-self.num_inputs // CHUNK_INPUTS[self.num_bits])

    @property
    def num_groups(self) -> int:
        """That have a scale, those past the inputs included: as many as 16 sums of 32 inputs make full."""
        return -(-4 * self.num_chunks // 16) * 16 * 32 // self.group_size if self.group_size else 0

    @property
    def weights_at(self) -> int:
        end = HEAD_BYTES + self.num_groups * (3 if self.has_zeros else 2)
        return -(-end // _ALIGNMENT) * _ALIGNMENT

    @property
    def row_bytes(self) -> int:
        return self.weights_at + 64 * self.num_chunks


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """Rounds the weights of attention, dense layers and experts, on the CPU. The router and the gate of the shared
    expert stay as they are, and so do embeddings and, unless asked for, the last layer.

    num_bits: 8 with a scale a row, or 4 with one a group of group_size inputs.
    form: in which a checkpoint has them so; None where they are rounded here.  experts: whether routed ones are, too.
    """

    num_bits: int
    group_size: int = 0
    has_zeros: bool = False
    lm_head: bool = False
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

    def with_experts(self, experts: bool) -> "Quantization":
        return replace(self, experts=experts)

    def layout(self, num_inputs: int) -> RowLayout:
        return RowLayout(self.num_bits, num_inputs, self.group_size, self.has_zeros)

    def matrix_bytes(self, num_outputs: int, num_inputs: int) -> int:
        return num_outputs * self.layout(num_inputs).row_bytes


def _named() -> dict[str, Quantization]:
    forms = {"int8": Quantization(num_bits=8), "int4": Quantization(num_bits=4, group_size=128)}
    for size in GROUP_SIZES:
        forms[f"int4-{size}"] = Quantization(num_bits=4, group_size=size)
        forms[f"int4-{size}-zeros"] = Quantization(num_bits=4, group_size=size, has_zeros=True)
    return forms | {f"{name}+lm_head": replace(form, lm_head=True) for name, form in forms.items()}


# int8; int4, with groups of 128, or int4-SIZE; `-zeros` where they are not symmetric; `+lm_head` for the last layer too
QUANTIZATIONS: Mapping[str, Quantization] = MappingProxyType(_named())


def stored_quantization(form: StoredForm) -> Quantization:
    """That of a checkpoint's weights. One scale for all inputs of an output is, in 4 bits, the same for each 128."""
    group_size = (form.group_size or 128) if form.num_bits == 4 else form.group_size
    return Quantization(
        num_bits=form.num_bits, group_size=group_size, has_zeros=not form.is_symmetric, lm_head=form.takes("lm_head"),
        form=form,
    )  # fmt: skip


def quantization_on(name: str, device_type: str, stored: Quantization | None = None) -> Quantization | None:
    """The one of a name, None for PLAIN. stored: the checkpoint's, which no other may be put upon.

    Raises SetupError for a device that has no products for it.
    """
    check_stored(name, stored)
    if name == PLAIN and stored is None:
        return None
    if device_type != "cpu":
        asked = f"quantization is {name!r}: weights are rounded"
        if stored is not None and stored.form is not None:
            asked = f"the checkpoint's weights are in {stored.num_bits} bits ({stored.form.title}): they are computed"
        raise SetupError(
            f"{asked} on CPUs only, not on {device_type}: set device to cpu, or give expert_quantization alone where "
            "only the experts are on CPUs"
        )
    return QUANTIZATIONS[name] if stored is None else stored


def check_stored(name: str, stored: Quantization | None) -> None:
    """Raises SetupError where weights that are rounded already are to be rounded again."""
    if stored is not None and name != PLAIN:
        raise SetupError(
            f"quantization is {name!r}, but the checkpoint has {KEY}: its weights are in {stored.num_bits} bits already"
        )
