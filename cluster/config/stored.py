"""Says what the forms have in common in which a checkpoint may have its linear layers rounded. Knows no tensors.

K: inputs, N: outputs, G: groups of inputs.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from cluster.config.json_keys import Keys
from cluster.errors import CheckpointError

KEY = "quantization_config"  # of config.json
GROUP_SIZES = (32, 64, 128)
PER_COLUMN = -1  # as group_size: one scale for all inputs of an output
INTEGERS = (".qweight", ".qzeros", ".g_idx", ".weight_packed", ".weight_zero_point")
"""The ends of names of tensors of whole numbers in 32 bits; scales are floating-point numbers."""
SIZES = (".weight_shape",)


class StoredForm(Protocol):
    """title: as messages call it.  numbers: the end of the name of a matrix's numbers, without its dot.

    group_size: inputs that share a scale, and a zero where they are not `is_symmetric`; 0 for all of an output.
    is_ordered: each matrix has its inputs in an order of its own.
    """

    @property
    def title(self) -> str: ...

    @property
    def numbers(self) -> str: ...

    @property
    def num_bits(self) -> int: ...

    @property
    def group_size(self) -> int: ...

    @property
    def is_symmetric(self) -> bool: ...

    @property
    def is_ordered(self) -> bool: ...

    def takes(self, layer: str) -> bool:
        """Whether the linear layer of this name, with all its dots, is stored so; else it is plain."""

    def shapes(self, layer: str, num_outputs: int, num_inputs: int) -> dict[str, tuple[int, ...]]:
        """The tensors of a layer by their names. Raises CheckpointError for a matrix that this form cannot have."""


def read_group_size(keys: Keys, key: str = "group_size") -> int:
    """0 for one of all inputs. Raises CheckpointError."""
    size = keys.count(key, PER_COLUMN, at_least=PER_COLUMN)
    if size not in (PER_COLUMN, *GROUP_SIZES):
        served = ", ".join(map(str, GROUP_SIZES))
        raise CheckpointError(f"{keys.where}: {key} is {size}, one of {served} or {PER_COLUMN} is needed")
    return max(0, size)


def check_divides(form: StoredForm, layer: str, *, outputs: tuple[int, int], inputs: tuple[int, int]) -> None:
    """outputs, inputs: how many, and a number that has to divide them. Raises CheckpointError."""
    if outputs[0] % outputs[1] or inputs[0] % inputs[1] or (form.group_size and inputs[0] % form.group_size):
        raise CheckpointError(
            f"config.json: {layer} has {inputs[0]} inputs and {outputs[0]} outputs, which {form.title}'s groups of "
            f"{form.group_size or inputs[0]} inputs and words of {max(outputs[1], inputs[1])} numbers do not divide"
        )


def given_object(raw: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """Raises CheckpointError."""
    given = raw.get(key)
    if not isinstance(given, Mapping):
        raise CheckpointError(f"{where}: {key} is {'missing' if given is None else 'no object'}: download it again")
    return given
