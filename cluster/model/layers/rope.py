"""Rotary position embedding: cosines and sines, angles in float32. Knows no model.

T: tokens, D: head size.
"""

import math

import torch
from torch import Tensor, nn

from cluster.config import RopeConfig


class RotaryEmbedding(nn.Module):
    """Cosines and sines of positions. The scaling is static: it changes short prompts too."""

    inv_freq: Tensor

    def __init__(self, rope: RopeConfig, head_dim: int) -> None:
        super().__init__()
        inv_freq, self.attention_factor = inverse_frequencies(rope, head_dim)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions: [T] int64. Returns cos and sin, each [T, 1, D] in `dtype`, times the attention factor."""
        angles = torch.outer(positions.float(), self.inv_freq)  # [T, D / 2]
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
        return (angles.cos() * self.attention_factor).to(dtype), (angles.sin() * self.attention_factor).to(dtype)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """[D / 2] float32, and the factor on cos and sin.

    Source: Su et al., RoFormer; linear: Chen et al., Position Interpolation; YaRN: Peng et al., eq. 15 to 22, with
    DeepSeek's mscale where a config has it, as transformers 5.24 computes them: in the same order, bit for bit.
    """
    wavelengths = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    inv_freq = 1.0 / wavelengths
    if rope.rope_type == "default":
        return inv_freq, 1.0
    if rope.rope_type == "linear":
        return inv_freq / rope.factor, 1.0

    def dimension_of(rotations: float) -> float:
        """The dimension whose wave turns `rotations` times over the original context."""
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (rope.factor * wavelengths) * (1 - kept) + inv_freq * kept, _yarn_attention_factor(rope)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)
