"""Forms in which a checkpoint may come rounded, as config.json says it: of GPTQ as the released MoE ones have it."""

from collections.abc import Mapping
from typing import Any

STORED: Mapping[str, Mapping[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "w8a16": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel", "symmetric": True}}
        },
        "ignore": ["lm_head"],
    },
}
