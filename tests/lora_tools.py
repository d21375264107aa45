"""LoRA adapters as small files."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from cluster.checkpoint.names import checkpoint_shapes
from cluster.checkpoint.opening import open_checkpoint


def write_adapter(directory: Path, changes: dict[str, tuple[torch.Tensor, torch.Tensor]], **config) -> Path:
    """An adapter of A [r, K] and B [N, r] by the layers' names. config: of adapter_config.json, beside the least."""
    directory.mkdir(parents=True)
    tensors = {
        f"base_model.model.{name}.lora_{half}.weight": matrix.contiguous()
        for name, pair in changes.items()
        for half, matrix in zip("AB", pair, strict=True)
    }
    save_file(tensors, directory / "adapter_model.safetensors")
    targets = sorted({name.rpartition(".")[2] for name in changes})
    least = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": targets}
    (directory / "adapter_config.json").write_text(json.dumps(least | config))
    return directory


def write_adapter_of(directory: Path, model_dir: Path, *names: str) -> Path:
    """An adapter of all layers of a checkpoint with these names, as `q_proj`, of drawn numbers."""
    draw, changes = torch.Generator().manual_seed(5), {}
    for name, shape in checkpoint_shapes(open_checkpoint(model_dir).config).items():
        if name.removesuffix(".weight").endswith(names):
            pair = [torch.randn(size, generator=draw) / 8 for size in ((2, shape[1]), (shape[0], 2))]
            changes[name.removesuffix(".weight")] = (pair[0], pair[1])
    return write_adapter(directory, changes)
