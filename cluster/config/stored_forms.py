"""Reads in which form a checkpoint's linear layers are rounded: one line for each method. Knows no tensors."""

from collections.abc import Callable, Mapping
from typing import Any

from cluster.config.awq import read_awq
from cluster.config.gptq import read_gptq
from cluster.config.json_keys import Keys, shown
from cluster.config.packed import read_packed
from cluster.config.quantization import Quantization, stored_quantization
from cluster.config.stored import KEY, StoredForm, given_object
from cluster.errors import CheckpointError

_READERS: Mapping[str, Callable[[Keys], StoredForm]] = {
    "gptq": read_gptq,
    "awq": read_awq,
    "compressed-tensors": read_packed,
}
# Parts of one matrix in memory: their forms cannot differ.
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_EXPERTS = ".experts."  # in the names of routed ones

Matrices = Mapping[str, tuple[int, int]]  # linear layers: their outputs and inputs


def read_stored(raw: Mapping[str, Any], matrices: Callable[[], Matrices]) -> Quantization | None:
    """Of a parsed config.json; None where it has no KEY. matrices: of the model, by the layers' names.

    Raises CheckpointError for another form than those that are served.
    """
    if not raw.get(KEY):
        return None
    keys = Keys(given_object(raw, KEY, "config.json"), f"config.json, {KEY}")
    method = keys.raw.get("quant_method")
    if not isinstance(method, str) or method not in _READERS:
        raise CheckpointError(
            f"{keys.where}: quant_method is {shown(method)}: served are {', '.join(_READERS)}, and weights in 16 bits, "
            "which --quantization rounds while they are loaded"
        )
    found = stored_quantization(_READERS[method](keys))
    return _checked(found, matrices())


def _checked(found: Quantization, matrices: Matrices) -> Quantization:
    """Whether routed experts are rounded too. Raises CheckpointError for matrices that the form does not take, and
    where some of those that lie together are kept as they are."""
    assert found.form is not None
    together: dict[str, tuple[str, bool]] = {}
    for layer, (num_outputs, num_inputs) in matrices.items():
        takes = found.takes(layer)
        if takes:
            found.form.shapes(layer, num_outputs, num_inputs)
        other, its = together.setdefault(_group(layer), (layer, takes))
        if its != takes:
            rounded, plain = (other, layer) if its else (layer, other)
            raise CheckpointError(
                f"config.json: {rounded} is in {found.num_bits} bits and {plain} is not: query, key and value, gate "
                "and up, and all routed experts need to be alike"
            )
    return found.with_experts(together.get(_EXPERTS, ("", True))[1])


def _group(layer: str) -> str:
    if _EXPERTS in layer:
        return _EXPERTS
    parent, _, name = layer.rpartition(".")
    return next((f"{parent}.{names[0]}" for names in _TOGETHER if name in names), layer)
