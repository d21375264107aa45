"""Small checkpoints with rounded layers in AWQ's and compressed-tensors' forms, and beside each the same in float32.

Knows nothing of the product's own packing: words are put together number by number, as the forms are published."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from configs import config, dense
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cluster import LLM, SamplingParams
from cluster.checkpoint.made.synthetic import write_checkpoint

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64,
    "num_experts": 6, "num_experts_per_tok": 2, "num_hidden_layers": 2,
}  # fmt: skip
MOE = config(**SIZES)
DENSE = dense(**{key: SIZES[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")})

Layer = Callable[[str, torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor] | None]
"""From a layer's name and matrix its tensors and the matrix that they mean; None for one that stays plain."""

PROMPTS = [[5, 9, 17, 33, 120, 7], [1, 2]]
GREEDY = SamplingParams(temperature=0, repetition_penalty=1.0, max_tokens=8, ignore_eos=True)

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # WQLinear_GEMM.from_linear's order_map: outputs, the lowest bits first


def offline(model_dir: Path, **options: Any) -> LLM:
    return LLM(model_dir, dtype="float32", device="cpu", skip_tokenizer=True, kv_cache_bytes=1 << 22, **options)


def assert_means(stored: Path, plain: Path) -> None:
    """The rounded checkpoint has transformers' logits on the numbers that it means, and their tokens."""
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32, attn_implementation="eager").eval()
    with offline(stored, num_expert_shards=2) as llm, offline(plain) as ours, torch.inference_mode():
        for prompt in PROMPTS:
            expected = model(torch.tensor([prompt])).logits[0]
            torch.testing.assert_close(llm.logits(prompt), expected, atol=2e-3, rtol=0)
        tokens, of_plain = ([o.token_ids for o in each.generate(PROMPTS, GREEDY)] for each in (llm, ours))
        assert tokens == of_plain


def write_both(folder: Path, raw: dict[str, Any], method: dict[str, Any], of_layer: Layer) -> tuple[Path, Path]:
    """Returns the directories of the rounded checkpoint and of the one in float32."""
    written, plain, stored = (folder / name for name in ("written", "plain", "stored"))
    write_checkpoint(written, raw, seed=1)
    of_plain: dict[str, torch.Tensor] = load_file(written / "model.safetensors")
    of_stored = dict(of_plain)
    for name in [name for name in of_plain if name.endswith("proj.weight")]:
        layer = name.removesuffix(".weight")
        made = of_layer(layer, of_plain[name])
        if made is not None:
            del of_stored[name]
            tensors, of_plain[name] = made
            biases = {f"{layer}.bias"} & of_plain.keys()  # those are real
            of_stored |= {f"{layer}.{end}": part for end, part in tensors.items() if f"{layer}.{end}" not in biases}
    for path, tensors, changes in ((plain, of_plain, {}), (stored, of_stored, {"quantization_config": method})):
        path.mkdir()
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps({**raw, **changes}))
    return stored, plain


def awq_config(**changes: Any) -> dict[str, Any]:
    """As AutoAWQ writes it."""
    written = {
        "quant_method": "awq", "zero_point": True, "group_size": 128, "bits": 4, "version": "gemm",
        "modules_to_not_convert": None,
    }  # fmt: skip
    return {**written, **changes}


def awq_layer(matrix: torch.Tensor, group_size: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Its tensors, and the matrix [N, K] float32 that they mean: (q - zero) * scale, group by group."""
    num_outputs, num_inputs = matrix.shape
    width = num_inputs if group_size == -1 else group_size
    groups = matrix.float().numpy().reshape(num_outputs, -1, width)
    lowest, highest = np.minimum(groups.min(2), 0), np.maximum(groups.max(2), 0)  # [N, G]
    scales = np.maximum((highest - lowest) / 15, 1e-3).astype(np.float16)
    wide = scales.astype(np.float32)
    zeros = np.clip(np.round(-lowest / wide), 0, 15).astype(np.int64)
    q = np.clip(np.round(groups / wide[:, :, None]) + zeros[:, :, None], 0, 15).astype(np.int64)
    means = (q - zeros[:, :, None]).astype(np.float32) * wide[:, :, None]
    tensors = {
        "qweight": awq_words(q.reshape(num_outputs, num_inputs).T),
        "qzeros": awq_words(zeros.T),
        "scales": torch.from_numpy(scales.T.copy()),
    }
    return tensors, torch.from_numpy(means.reshape(num_outputs, num_inputs))


def awq_words(numbers: np.ndarray) -> torch.Tensor:
    """[R, 8 C], each from 0 to 15 -> [R, C] int32."""
    packed = np.zeros((numbers.shape[0], numbers.shape[1] // 8), dtype=np.uint32)
    for column in range(packed.shape[1]):
        for place, output in enumerate(AWQ_ORDER):
            packed[:, column] |= numbers[:, 8 * column + output].astype(np.uint32) << np.uint32(4 * place)
    return torch.from_numpy(packed.view(np.int32).copy())


def write_awq(
    folder: Path, raw: dict[str, Any], *, group_size: int = 32, kept: tuple[str, ...] = ()
) -> tuple[Path, Path]:
    """kept: modules_to_not_convert, each a part of a name between dots."""
    method = awq_config(group_size=group_size, modules_to_not_convert=list(kept) or None)
    return write_both(
        folder, raw, method,
        lambda layer, matrix: None if set(kept) & set(layer.split(".")) else awq_layer(matrix, group_size),
    )  # fmt: skip


def packed_config(num_bits: int = 8, group_size: int | None = None, symmetric: bool = True, **changes: Any) -> dict:
    """As llm-compressor writes it for W8A16 and W4A16."""
    weights = {
        "actorder": None, "block_structure": None, "dynamic": False, "group_size": group_size, "num_bits": num_bits,
        "observer": "minmax", "observer_kwargs": {}, "strategy": "channel" if group_size is None else "group",
        "symmetric": symmetric, "type": "int",
    }  # fmt: skip
    weights |= {key: changes.pop(key) for key in list(changes) if key in weights}
    group = {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": weights}
    group |= {key: changes.pop(key) for key in list(changes) if key in group}
    written = {
        "config_groups": {"group_0": group}, "format": "pack-quantized", "global_compression_ratio": None,
        "ignore": ["lm_head", "re:.*mlp.gate$", "re:.*shared_expert_gate$"], "kv_cache_scheme": None,
        "quant_method": "compressed-tensors", "quantization_status": "compressed", "sparsity_config": {},
        "transform_config": {}, "version": "0.20.0",
    }  # fmt: skip
    return {**written, **changes}


def packed_layer(
    matrix: torch.Tensor, num_bits: int, group_size: int | None, symmetric: bool
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """As of `awq_layer`, of numbers with a sign; scales in bfloat16."""
    num_outputs, num_inputs = matrix.shape
    half = 2 ** (num_bits - 1)
    groups = matrix.float().reshape(num_outputs, -1, group_size or num_inputs)
    if symmetric:
        scales = groups.abs().amax(2).clamp_min(1e-3) * 2 / (2 * half - 1)
    else:
        scales = ((groups.amax(2).clamp_min(0) - groups.amin(2).clamp_max(0)) / (2 * half - 1)).clamp_min(1e-3)
    scales = scales.bfloat16()
    wide = scales.float().unsqueeze(2)
    zeros = torch.zeros_like(wide) if symmetric else (-half - groups.amin(2, True).clamp_max(0) / wide).round()
    zeros = zeros.clamp(-half, half - 1)
    q = ((groups / wide).round() + zeros).clamp(-half, half - 1)
    tensors = {
        "weight_packed": packed_words(q.reshape(num_outputs, num_inputs).numpy(), num_bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor([num_outputs, num_inputs]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = packed_words(zeros.squeeze(2).numpy().T, num_bits).T.contiguous()
    return tensors, ((q - zeros) * wide).reshape(num_outputs, num_inputs)


def packed_words(numbers: np.ndarray, num_bits: int) -> torch.Tensor:
    """[R, C] with a sign -> [R, C / numbers of a word, rounded up] int32."""
    of_word = 32 // num_bits
    packed = np.zeros((numbers.shape[0], -(-numbers.shape[1] // of_word)), dtype=np.uint32)
    for column in range(numbers.shape[1]):
        stored = (numbers[:, column].astype(np.int64) + 2 ** (num_bits - 1)).astype(np.uint32)
        packed[:, column // of_word] |= stored << np.uint32(num_bits * (column % of_word))
    return torch.from_numpy(packed.view(np.int32).copy())


def write_packed(
    folder: Path, raw: dict[str, Any], num_bits: int = 8, group_size: int | None = None, symmetric: bool = True
) -> tuple[Path, Path]:
    method = packed_config(num_bits, group_size, symmetric)
    return write_both(folder, raw, method, lambda _, matrix: packed_layer(matrix, num_bits, group_size, symmetric))
