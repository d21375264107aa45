"""Names the ways in which weights can be rounded while they are loaded, and how their rows lie. Knows no tensors.

A checkpoint may have them rounded already (`gptq.py`)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from cluster.config.gptq import GROUP_SIZES, KEY, Gptq
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
    gptq: the form in which a checkpoint has them so; None where they are rounded here.
    """

    num_bits: int
    group_size: int = 0
    has_zeros: bool = False
    lm_head: bool = False
    gptq: Gptq | None = None

    def takes(self, layer: str) -> bool:
        """Whether it is meant for a linear layer of this name."""
        return self.lm_head if layer == "lm_head" else layer not in _KEPT

    @property
    def is_ordered(self) -> bool:
        """Whether each matrix has an order of inputs of its own."""
        return self.gptq is not None and self.gptq.desc_act

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


def stored_quantization(gptq: Gptq, *, symmetric: bool) -> Quantization:
    """That of a checkpoint's weights. One scale for all inputs of an output is the same for each group of 128."""
    return Quantization(num_bits=4, group_size=gptq.group_size or 128, has_zeros=not symmetric, gptq=gptq)


def quantization_on(name: str, device_type: str, stored: Quantization | None = None) -> Quantization | None:
    """The one of a name, None for PLAIN. stored: the checkpoint's, which no other may be put upon.

    Raises SetupError for a device that has no products for it.
    """
    check_stored(name, stored)
    if name == PLAIN and stored is None:
        return None
    if device_type != "cpu":
        asked = f"quantization is {name!r}: weights are rounded" if stored is None else "a GPTQ checkpoint is computed"
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
