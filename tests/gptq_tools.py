"""Small checkpoints in GPTQ's form, packed as AutoGPTQ's QuantLinear.pack does it, and beside each the same model in
float32, for transformers. Knows nothing of the product's own packing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from configs import config, dense
from safetensors.torch import load_file, save_file

from cluster.checkpoint.made.synthetic import write_checkpoint

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64,
    "num_experts": 6, "num_experts_per_tok": 2, "num_hidden_layers": 2,
}  # fmt: skip
MOE = config(**SIZES)
DENSE = dense(**{key: SIZES[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")})


def quantization_config(**changes: Any) -> dict[str, Any]:
    """As in the released Qwen1.5-MoE-A2.7B-Chat-GPTQ-Int4."""
    released = {
        "bits": 4, "group_size": 128, "damp_percent": 0.01, "desc_act": False, "static_groups": False, "sym": True,
        "true_sequential": True, "model_name_or_path": None, "model_file_base_name": "model", "quant_method": "gptq",
    }  # fmt: skip
    return {**released, **changes}


def words(numbers: np.ndarray) -> torch.Tensor:
    """[8 R, C], each from 0 to 15 -> [R, C] int32, the first of eight in the lowest bits."""
    packed = np.zeros((numbers.shape[0] // 8, numbers.shape[1]), dtype=np.uint32)
    for row in range(numbers.shape[0]):
        packed[row // 8] |= numbers[row].astype(np.uint32) << np.uint32(4 * (row % 8))
    return torch.from_numpy(packed.view(np.int32).copy())


def rounded(
    matrix: torch.Tensor, group_size: int, *, sym: bool, is_v1: bool, order: np.ndarray | None = None
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of one layer, and the matrix [N, K] float32 that they mean: (q - zero) * scale, group by group.

    order: of the inputs, in which they are put into groups; they are stored where they were.
    """
    num_outputs, num_inputs = matrix.shape
    width = num_inputs if group_size == -1 else group_size
    order = np.arange(num_inputs) if order is None else order
    weights = matrix.float().numpy().T[order]  # [K, N]
    q, means = np.zeros(weights.shape, dtype=np.int64), np.zeros(weights.shape, dtype=np.float32)
    scales, zeros = [], []
    for begin in range(0, num_inputs, width):
        group = weights[begin : begin + width]
        lowest, highest = np.minimum(group.min(0), 0), np.maximum(group.max(0), 0)
        scale = (2 * np.maximum(-lowest, highest) / 15 if sym else (highest - lowest) / 15).astype(np.float16)
        scale = np.maximum(scale, np.float16(1e-3))
        zero = np.full(num_outputs, 8) if sym else np.clip(np.round(-lowest / scale), 1, 15).astype(np.int64)
        q[begin : begin + width] = np.clip(np.round(group / scale.astype(np.float32)) + zero, 0, 15)
        means[begin : begin + width] = (q[begin : begin + width] - zero) * scale.astype(np.float32)
        scales.append(scale)
        zeros.append(zero)
    stored_zeros = np.array(zeros) - is_v1  # [G, N]
    places = np.argsort(order)
    q, means = q[places], means[places]
    tensors = {
        "qweight": words(q),
        "qzeros": words(stored_zeros.T).T.contiguous(),
        "scales": torch.from_numpy(np.array(scales)),
        "g_idx": torch.from_numpy((places // width).astype(np.int32)),
        "bias": torch.zeros(num_outputs, dtype=torch.float16),
    }
    return tensors, torch.from_numpy(means.T.copy())


def write_pair(
    folder: Path,
    raw: dict[str, Any],
    *,
    group_size: int = 32,
    sym: bool = True,
    is_v1: bool = True,
    desc_act: bool = False,
) -> tuple[Path, Path]:
    """Returns the directories of the checkpoint in GPTQ's form and of the one in float32."""
    draw = np.random.default_rng(2)
    written, plain, gptq = (folder / name for name in ("written", "plain", "gptq"))
    write_checkpoint(written, raw, seed=1)
    of_plain, of_gptq = {}, {}
    for name, tensor in load_file(written / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            of_plain[name] = of_gptq[name] = tensor
            continue
        layer = name.removesuffix(".weight")
        order = draw.permutation(tensor.shape[1]) if desc_act else None
        parts, of_plain[name] = rounded(tensor, group_size, sym=sym, is_v1=is_v1, order=order)
        of_gptq |= {f"{layer}.{end}": part for end, part in parts.items() if f"{layer}.{end}" not in of_gptq}
    biases = {name: tensor for name, tensor in of_plain.items() if name.endswith("_proj.bias")}  # those are real
    version = {} if is_v1 else {"checkpoint_format": "gptq_v2"}
    method = quantization_config(group_size=group_size, sym=sym, desc_act=desc_act, **version)
    for path, tensors, changes in ((plain, of_plain, {}), (gptq, of_gptq | biases, {"quantization_config": method})):
        path.mkdir()
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps({**raw, **changes}))
    return gptq, plain
