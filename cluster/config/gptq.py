"""Linear layers in 4 bits as GPTQ's checkpoints have them: what config.json says of them, and their tensors.

Source: AutoGPTQ's and GPTQModel's QuantizeConfig and packing. K: inputs, N: outputs, G: groups of inputs.
"""

from dataclasses import dataclass
from typing import ClassVar

from cluster.config.json_keys import Keys, shown
from cluster.config.stored import check_divides, read_group_size
from cluster.errors import CheckpointError

PACKED = 8  # numbers of 4 bits in an int32, the lowest bits first
_FORMATS = {"gptq": 1, "gptq_v2": 0}


@dataclass(frozen=True, slots=True)
class Gptq:
    """A `StoredForm`. zero_shift: added to a stored zero; files of version 1 store it less 1.
    is_symmetric: all zeros are in the middle.  is_ordered: of `desc_act`, a group's inputs may be any.
    """

    group_size: int
    zero_shift: int
    is_symmetric: bool = True
    is_ordered: bool = False
    title: ClassVar[str] = "GPTQ"
    numbers: ClassVar[str] = "qweight"
    num_bits: ClassVar[int] = 4

    def takes(self, layer: str) -> bool:
        return layer != "lm_head"

    def shapes(self, layer: str, num_outputs: int, num_inputs: int) -> dict[str, tuple[int, ...]]:
        check_divides(self, layer, outputs=(num_outputs, PACKED), inputs=(num_inputs, PACKED))
        num_groups = num_inputs // self.group_size if self.group_size else 1
        return {
            f"{layer}.qweight": (num_inputs // PACKED, num_outputs),
            f"{layer}.qzeros": (num_groups, num_outputs // PACKED),
            f"{layer}.scales": (num_groups, num_outputs),
            f"{layer}.g_idx": (num_inputs,),
        }


def read_gptq(keys: Keys) -> Gptq:
    """Raises CheckpointError for another form than those that are served."""
    stored = keys.raw.get("checkpoint_format") or "gptq"
    if not isinstance(stored, str) or stored not in _FORMATS:
        raise CheckpointError(f"{keys.where}: checkpoint_format is {shown(stored)}, served are {', '.join(_FORMATS)}")
    if (bits := keys.count("bits")) != 4:
        raise CheckpointError(f"{keys.where}: bits is {bits}, GPTQ is served with 4")
    group_size, is_symmetric = read_group_size(keys), keys.flag("sym", True)
    return Gptq(group_size, _FORMATS[stored], is_symmetric, keys.flag("desc_act", False))
