"""Made LoRA adapters: random matrices, to measure with. Knows no model in memory."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from cluster.checkpoint.adapters import ADAPTER_FILE
from cluster.checkpoint.names import checkpoint_shapes
from cluster.config import ModelConfig
from cluster.config.lora import ADAPTER_CONFIG

SCALE = 0.01  # of the numbers: they change answers a little, and nothing overflows


def write_adapter(directory: Path, config: ModelConfig, *, rank: int, seed: int) -> None:
    """Of attention, dense layers and shared experts; routed experts and routers are no linear layers to PEFT with
    transformers 5. Makes the directory."""
    draw = torch.Generator().manual_seed(seed)
    tensors, names = {}, []
    for name, shape in checkpoint_shapes(config).items():
        if not name.endswith("_proj.weight") or ".experts." in name:
            continue
        names.append(name.removesuffix(".weight"))
        for half, size in (("A", (rank, shape[1])), ("B", (shape[0], rank))):
            tensors[f"base_model.model.{names[-1]}.lora_{half}.weight"] = torch.randn(size, generator=draw) * SCALE
    directory.mkdir(parents=True)
    save_file(tensors, directory / ADAPTER_FILE)
    written = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": names}
    (directory / ADAPTER_CONFIG).write_text(json.dumps(written))
