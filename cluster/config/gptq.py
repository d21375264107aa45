"""Linear layers in 4 bits as GPTQ's checkpoints have them: what config.json says of them, and their tensors.

Source: AutoGPTQ's and GPTQModel's QuantizeConfig and packing. K: inputs, N: outputs, G: groups of inputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.config.json_keys import Keys, shown
from cluster.errors import CheckpointError

KEY = "quantization_config"
PACKED = 8  # numbers of 4 bits in an int32, the lowest bits first
GROUP_SIZES = (32, 64, 128)
PER_COLUMN = -1
_FORMATS = {"gptq": 1, "gptq_v2": 0}
INTEGERS = (".qweight", ".qzeros", ".g_idx")
"""The ends of names of tensors in int32; `.scales` are floating-point numbers."""


@dataclass(frozen=True, slots=True)
class Gptq:
    """group_size: inputs that share a scale and a zero; 0 for all inputs of an output.
    zero_shift: added to a stored zero; files of version 1 store it less 1.
    desc_act: a group's inputs may be any, in an order of each matrix's own.
    """

    group_size: int
    zero_shift: int
    desc_act: bool = False

    def num_groups(self, num_inputs: int) -> int:
        return num_inputs // self.group_size if self.group_size else 1

    def shapes(self, name: str, num_outputs: int, num_inputs: int) -> dict[str, tuple[int, ...]]:
        """The tensors of a layer that is called `name` in the checkpoint. Raises CheckpointError for a matrix that this
        form cannot have."""
        if num_inputs % (self.group_size or PACKED) or num_inputs % PACKED or num_outputs % PACKED:
            raise CheckpointError(
                f"config.json: {name} has {num_inputs} inputs and {num_outputs} outputs, which GPTQ's groups of "
                f"{self.group_size or num_inputs} inputs and words of {PACKED} numbers do not divide"
            )
        num_groups = self.num_groups(num_inputs)
        return {
            f"{name}.qweight": (num_inputs // PACKED, num_outputs),
            f"{name}.qzeros": (num_groups, num_outputs // PACKED),
            f"{name}.scales": (num_groups, num_outputs),
            f"{name}.g_idx": (num_inputs,),
        }


def read_gptq(raw: Mapping[str, Any]) -> tuple[Gptq, bool]:
    """Of a config.json with the KEY; whether all zeros are in the middle, too. Raises CheckpointError for another form
    than those that are served."""
    given = raw[KEY]
    if not isinstance(given, Mapping):
        raise CheckpointError(f"config.json: {KEY} is no object: download it again")
    keys = Keys(given, f"config.json, {KEY}")
    method, stored = given.get("quant_method"), given.get("checkpoint_format") or "gptq"
    if method != "gptq" or not isinstance(stored, str) or stored not in _FORMATS:
        raise CheckpointError(
            f"config.json: {KEY} has quant_method {shown(method)} and checkpoint_format {shown(stored)}: served are "
            f"gptq with {' or '.join(_FORMATS)}, and weights in 16 bits, which --quantization rounds while they are "
            "loaded"
        )
    if (bits := keys.count("bits")) != 4:
        raise CheckpointError(f"config.json: {KEY} has bits {bits}, GPTQ is served with 4")
    group_size = keys.count("group_size", PER_COLUMN, at_least=PER_COLUMN)
    if group_size not in (PER_COLUMN, *GROUP_SIZES):
        served = ", ".join(map(str, GROUP_SIZES))
        raise CheckpointError(
            f"config.json: {KEY} has group_size {group_size}, one of {served} or {PER_COLUMN} is needed"
        )
    desc_act = keys.flag("desc_act", False)
    return Gptq(max(0, group_size), _FORMATS[stored], desc_act), keys.flag("sym", True)
