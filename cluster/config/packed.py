"""Linear layers in 8 or 4 bits as compressed-tensors' files have them: what config.json says of them, their tensors.

Source: compressed-tensors' QuantizationConfig and pack-quantized format. K: inputs, N: outputs, G: groups of inputs.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from cluster.config.json_keys import Keys, shown
from cluster.config.stored import GROUP_SIZES, check_divides, given_object
from cluster.errors import CheckpointError

_REGEX = "re:"
# A pattern comes from the file, is tried on every name, and must end soon: Python tries all ways to repeat.
_MOST_REPEATS, _MOST_PATTERN = 4, 200
_REPEAT = re.compile(r"(?<!\\)[*+{?]")


@dataclass(frozen=True, slots=True)
class Packed:
    """A `StoredForm`. ignored: names of layers that are stored plain, or `re:` and a pattern from their beginning."""

    num_bits: int
    group_size: int
    is_symmetric: bool = True
    ignored: frozenset[str] = frozenset()
    title: ClassVar[str] = "compressed-tensors"
    numbers: ClassVar[str] = "weight_packed"
    is_ordered: ClassVar[bool] = False

    @property
    def packed(self) -> int:
        """Numbers in an int32, the lowest bits first."""
        return 32 // self.num_bits

    def takes(self, layer: str) -> bool:
        if layer in self.ignored:
            return False
        return not any(re.match(name.removeprefix(_REGEX), layer) for name in self.ignored if name.startswith(_REGEX))

    def shapes(self, layer: str, num_outputs: int, num_inputs: int) -> dict[str, tuple[int, ...]]:
        zeros = 1 if self.is_symmetric else self.packed
        check_divides(self, layer, outputs=(num_outputs, zeros), inputs=(num_inputs, 1))
        num_groups = num_inputs // self.group_size if self.group_size else 1
        shapes: dict[str, tuple[int, ...]] = {
            f"{layer}.weight_packed": (num_outputs, -(-num_inputs // self.packed)),
            f"{layer}.weight_scale": (num_outputs, num_groups),
            f"{layer}.weight_shape": (2,),
        }
        if not self.is_symmetric:
            shapes[f"{layer}.weight_zero_point"] = (num_outputs // self.packed, num_groups)
        return shapes


def read_packed(keys: Keys) -> Packed:
    """Raises CheckpointError for another form than those that are served."""
    groups = given_object(keys.raw, "config_groups", keys.where)
    if len(groups) != 1:
        raise CheckpointError(f"{keys.where}: config_groups has {len(groups)} groups, one for all layers is served")
    name, where = next(iter(groups)), keys.where
    group = given_object(groups, name, f"{where}, config_groups")
    for part, key in ((group, "input_activations"), (group, "output_activations"), (keys.raw, "kv_cache_scheme")):
        if part.get(key) is not None:
            raise CheckpointError(
                f"{where}: {key} is {shown(part[key])}: served are weights alone in fewer bits (W8A16, W4A16), for "
                "others answers would not be those that the checkpoint was measured with"
            )
    if keys.raw.get("transform_config"):
        raise CheckpointError(f"{where}: transform_config is {shown(keys.raw['transform_config'])}, none is served")
    _check_formats(keys, group)
    if group.get("targets") != ["Linear"]:
        raise CheckpointError(f"{where}: targets is {shown(group.get('targets'))}, ['Linear'] is served")
    weights = Keys(given_object(group, "weights", f"{where}, {name}"), f"{where}, {name}, weights")
    return _read_weights(weights, _ignored(keys))


def _check_formats(keys: Keys, group: Mapping[str, Any]) -> None:
    sparsity = keys.raw.get("sparsity_config") or {}
    wanted: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("format", group.get("format") or keys.raw.get("format"), ("pack-quantized",)),
        ("quantization_status", keys.raw.get("quantization_status") or "compressed", ("compressed",)),
        ("sparsity_config", sparsity.get("format", "dense") if isinstance(sparsity, Mapping) else sparsity, ("dense",)),
    ]
    for key, found, served in wanted:
        if found not in served:
            raise CheckpointError(
                f"{keys.where}: {key} is {shown(found)}, {served[0]} is served, and weights in 16 bits, which "
                "--quantization rounds while they are loaded"
            )


def _read_weights(keys: Keys, ignored: frozenset[str]) -> Packed:
    bits, is_symmetric = keys.count("num_bits"), keys.flag("symmetric", True)
    strategy = keys.raw.get("strategy")
    size = keys.count("group_size") if strategy == "group" else 0
    served = [
        ("num_bits", bits, (8, 4)),
        ("type", keys.raw.get("type") or "int", ("int",)),
        ("dynamic", keys.raw.get("dynamic") or False, (False,)),
        ("strategy", strategy, ("channel", "group")),
        ("group_size", size, (0, *GROUP_SIZES)),
        ("symmetric", is_symmetric, (True, False) if bits == 4 else (True,)),
        ("actorder", keys.raw.get("actorder"), (None, "weight", "static")),
    ]
    for key, found, possible in served:
        if found not in possible:
            raise CheckpointError(
                f"{keys.where}: {key} is {shown(found)}, with {bits} bits {' or '.join(map(str, possible))} is served"
            )
    return Packed(bits, size, is_symmetric, ignored)


def _ignored(keys: Keys) -> frozenset[str]:
    ignored = frozenset(keys.names("ignore"))
    for name in ignored:
        if not name.startswith(_REGEX):
            continue
        pattern = name.removeprefix(_REGEX)
        try:
            re.compile(pattern)
        except re.error as error:
            raise CheckpointError(f"{keys.where}: ignore has {shown(name)}, which is no pattern: {error}") from error
        repeats = len(_REPEAT.findall(pattern))
        if len(pattern) > _MOST_PATTERN or repeats > _MOST_REPEATS or re.search(r"\)[*+{?]", pattern):
            raise CheckpointError(
                f"{keys.where}: ignore has {shown(name)}: patterns of {_MOST_PATTERN} characters with {_MOST_REPEATS} "
                "repetitions are served, none of a group: name the layers"
            )
    return ignored
