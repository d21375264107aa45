"""Names the ways in which weights can be rounded while they are loaded. Knows no tensors.

There is no argument of a cluster for it yet: a variable of the environment chooses it, for `moe-cluster bench`.
"""

import os
from dataclasses import dataclass, replace

from cluster.errors import SetupError

VARIABLE = "MOE_CLUSTER_QUANTIZATION"  # in the environment: a name of `quantizations`
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """Rounds the weights of attention, dense layers and experts, on the CPU. The router and the gate of the shared
    expert stay as they are, and so do embeddings and, unless asked for, the last layer.

    num_bits: 8 with a scale a row, or 4 with one a group of group_size inputs.
    """

    num_bits: int
    group_size: int = 0
    has_zeros: bool = False
    lm_head: bool = False

    def takes(self, layer: str) -> bool:
        """Whether it is meant for a linear layer of this name."""
        return self.lm_head if layer == "lm_head" else layer not in ("shared_expert_gate", "score", "qa_outputs")


def quantizations() -> dict[str, Quantization]:
    """By name: int8; int4, with groups of 128, or int4-SIZE; `-zeros` where they are not symmetric; `+lm_head` for the
    last layer too."""
    forms = {"int8": Quantization(num_bits=8), "int4": Quantization(num_bits=4, group_size=128)}
    for size in GROUP_SIZES:
        forms[f"int4-{size}"] = Quantization(num_bits=4, group_size=size)
        forms[f"int4-{size}-zeros"] = Quantization(num_bits=4, group_size=size, has_zeros=True)
    return forms | {f"{name}+lm_head": replace(form, lm_head=True) for name, form in forms.items()}


def chosen_quantization(device_type: str) -> Quantization | None:
    """As this process's environment has it, None without. Raises SetupError."""
    name, known = os.environ.get(VARIABLE, ""), quantizations()
    if not name:
        return None
    if name not in known:
        raise SetupError(f"{VARIABLE} is {name!r}, one of {', '.join(known)} is needed")
    if device_type != "cpu":
        raise SetupError(f"{VARIABLE} is {name!r}: weights are rounded on CPUs only, not on {device_type}; unset it")
    return known[name]
