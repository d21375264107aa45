"""Small checkpoints in GPTQ's form, packed as AutoGPTQ's QuantLinear.pack does it, and beside each the same model in
float32, for transformers. Knows nothing of the product's own packing."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from stored_tools import write_both


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

    def of_layer(layer: str, matrix: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        order = draw.permutation(matrix.shape[1]) if desc_act else None
        return rounded(matrix, group_size, sym=sym, is_v1=is_v1, order=order)

    version = {} if is_v1 else {"checkpoint_format": "gptq_v2"}
    method = quantization_config(group_size=group_size, sym=sym, desc_act=desc_act, **version)
    return write_both(folder, raw, method, of_layer)
