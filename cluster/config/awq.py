"""Linear layers in 4 bits as AWQ's checkpoints have them: what config.json says of them, and their tensors.

Source: AutoAWQ's AwqConfig and WQLinear_GEMM. K: inputs, N: outputs, G: groups of inputs.
"""

from dataclasses import dataclass
from typing import ClassVar

from cluster.config.json_keys import Keys, shown
from cluster.config.stored import check_divides, read_group_size
from cluster.errors import CheckpointError

PACKED = 8  # outputs in an int32, in the order of INTERLEAVED, the lowest bits first
INTERLEAVED = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, slots=True)
class Awq:
    """A `StoredForm`. kept: of `modules_to_not_convert`, some of a name's parts between dots, one after another. As
    pieces of text, which AutoAWQ compares, `gate` for the router would stand for each gate_proj too."""

    group_size: int
    kept: tuple[str, ...] = ()
    title: ClassVar[str] = "AWQ"
    numbers: ClassVar[str] = "qweight"
    num_bits: ClassVar[int] = 4
    is_symmetric: ClassVar[bool] = False
    is_ordered: ClassVar[bool] = False

    def takes(self, layer: str) -> bool:
        return layer != "lm_head" and not any(f".{kept.strip('.')}." in f".{layer}." for kept in self.kept)

    def shapes(self, layer: str, num_outputs: int, num_inputs: int) -> dict[str, tuple[int, ...]]:
        check_divides(self, layer, outputs=(num_outputs, PACKED), inputs=(num_inputs, 1))
        num_groups = num_inputs // self.group_size if self.group_size else 1
        return {
            f"{layer}.qweight": (num_inputs, num_outputs // PACKED),
            f"{layer}.qzeros": (num_groups, num_outputs // PACKED),
            f"{layer}.scales": (num_groups, num_outputs),
        }


def read_awq(keys: Keys) -> Awq:
    """Raises CheckpointError for another form than those that are served."""
    given = (keys.raw.get(key) for key in ("version", "checkpoint_format", "format"))
    version = next((found for found in given if found), "gemm")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise CheckpointError(
            f"{keys.where}: version is {shown(version)}, AWQ is served as gemm alone: AutoAWQ's own default, which "
            "quantizes with version GEMM"
        )
    if (bits := keys.count("bits" if keys.has("bits") else "w_bit")) != 4:
        raise CheckpointError(f"{keys.where}: bits is {bits}, AWQ is served with 4")
    if not keys.flag("zero_point", True):
        raise CheckpointError(f"{keys.where}: zero_point is false, AWQ's gemm has a zero for each group")
    kept = keys.names("modules_to_not_convert")
    return Awq(read_group_size(keys, "q_group_size" if keys.has("q_group_size") else "group_size"), kept)
