"""LoRA adapters as small files."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

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


def write_adapter_of(directory: Path, model_dir: Path, *names: str, scale: float = 1 / 8) -> Path:
    """An adapter of all layers of a checkpoint with these names, as `q_proj`, of drawn numbers. scale: of them."""
    draw, changes = torch.Generator().manual_seed(5), {}
    for name, shape in checkpoint_shapes(open_checkpoint(model_dir).config).items():
        if name.removesuffix(".weight").endswith(names):
            pair = [torch.randn(size, generator=draw) * scale for size in ((2, shape[1]), (shape[0], 2))]
            changes[name.removesuffix(".weight")] = (pair[0], pair[1])
    return write_adapter(directory, changes)


def write_merged(directory: Path, model_dir: Path, adapter: Path) -> Path:
    """A checkpoint of one file with W + B A times the factor in place of each W that `write_adapter` has changed."""
    tensors, pairs = load_file(model_dir / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    raw = json.loads((adapter / "adapter_config.json").read_text())
    for stored in [name for name in pairs if ".lora_A." in name]:
        layer = stored.removeprefix("base_model.model.model.").removesuffix(".lora_A.weight")
        [name] = [name for name in tensors if name.endswith(f"{layer}.weight")]
        b = pairs[stored.replace(".lora_A.", ".lora_B.")]
        tensors[name] += raw["lora_alpha"] / raw["r"] * b @ pairs[stored]
    directory.mkdir(parents=True)
    shutil.copy(model_dir / "config.json", directory)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
