"""Rotary position embedding: cosines and sines, angles in float32. Knows no model.

T: tokens, D: head size.
"""

import math

import torch
from torch import Tensor, nn

from cluster.config import RopeConfig


class RotaryEmbedding(nn.Module):
    """Cosines and sines of positions. A scaling that does not vary with the length changes short prompts too."""

    inv_freq: Tensor
    stretched: Tensor
    exponents: Tensor

    def __init__(self, rope: RopeConfig, head_dim: int) -> None:
        super().__init__()
        inv_freq, self.attention_factor = inverse_frequencies(rope, head_dim)
        stretched = _longrope(rope, head_dim, rope.long_factor) if rope.rope_type == "longrope" else inv_freq
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("stretched", stretched, persistent=False)
        self.register_buffer("exponents", _exponents(head_dim), persistent=False)
        self._rope = rope
        self._head_dim = head_dim

    def forward(self, positions: Tensor, lengths: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions, lengths: [T] int64. Returns cos and sin, each [T, 1, D] in `dtype`, times the attention factor.

        lengths: of each token's sequence when the token was new, the whole prompt for all of its tokens. A row depends
        on its own position and length alone.
        """
        if self._rope.varies:
            angles = positions.float().unsqueeze(1) * self._frequencies_of(lengths)  # [T, D / 2]
        else:
            angles = torch.outer(positions.float(), self.inv_freq)
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
        return (angles.cos() * self.attention_factor).to(dtype), (angles.sin() * self.attention_factor).to(dtype)

    def _frequencies_of(self, lengths: Tensor) -> Tensor:
        """[T, D / 2] float32."""
        stretched = self.stretched
        if self._rope.rope_type == "dynamic":
            if lengths.device.type == "cpu":  # torch's power rounds a row by its place in a vector: one at a time
                every, places = torch.unique(lengths, return_inverse=True)
                stretched = torch.stack([self._dynamic(length) for length in every])[places]
            else:
                stretched = self._dynamic(lengths.unsqueeze(1))
        is_longer = lengths > self._rope.original_max_position_embeddings
        return torch.where(is_longer.unsqueeze(1), stretched, self.inv_freq)

    def _dynamic(self, lengths: Tensor) -> Tensor:
        """The frequencies of queries and keys that are new at a length. lengths: [] or [T, 1].

        Source: dynamic NTK, by bloc97 and emozilla; in the order of transformers 5.24.
        """
        rope, dim = self._rope, self._head_dim
        lengths = lengths.clamp(min=rope.original_max_position_embeddings)
        ratio = (rope.factor * lengths / rope.original_max_position_embeddings) - (rope.factor - 1)
        base = rope.theta * ratio ** (dim / (dim - 2))
        return 1.0 / base**self.exponents


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """[D / 2] float32, those of a short sequence where they vary, and the factor on cos and sin.

    Source: Su et al., RoFormer; linear: Chen et al., Position Interpolation; YaRN: Peng et al., eq. 15 to 22, with
    DeepSeek's mscale where a config has it; LongRoPE: Ding et al.; llama3: Meta's Llama 3.1. As transformers 5.24
    computes them: in the same order, bit for bit.
    """
    inv_freq = 1.0 / rope.theta ** _exponents(head_dim)
    match rope.rope_type:
        case "linear":
            return inv_freq / rope.factor, 1.0
        case "yarn":
            return _yarn(rope, head_dim), _yarn_attention_factor(rope)
        case "llama3":
            return _llama3(rope, inv_freq), 1.0
        case "longrope":
            return _longrope(rope, head_dim, rope.short_factor), _longrope_attention_factor(rope)
    return inv_freq, 1.0  # "default", and "dynamic" up to the original context


def _exponents(head_dim: int) -> Tensor:
    return torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim


def _yarn(rope: RopeConfig, head_dim: int) -> Tensor:
    def dimension_of(rotations: float) -> float:
        """The dimension whose wave turns `rotations` times over the original context."""
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    wavelengths = rope.theta ** _exponents(head_dim)
    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (rope.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def _llama3(rope: RopeConfig, inv_freq: Tensor) -> Tensor:
    """Long waves are stretched, short ones kept, those between are mixed."""
    original, low, high = rope.original_max_position_embeddings, rope.low_freq_factor, rope.high_freq_factor
    waves = 2 * math.pi / inv_freq
    scaled = torch.where(waves > original / low, inv_freq / rope.factor, inv_freq)
    kept = (original / waves - low) / (high - low)
    mixed = (1 - kept) * scaled / rope.factor + kept * scaled
    return torch.where((waves >= original / high) & (waves <= original / low), mixed, scaled)


def _longrope(rope: RopeConfig, head_dim: int, factors: tuple[float, ...]) -> Tensor:
    return 1.0 / (torch.tensor(factors, dtype=torch.float32) * rope.theta ** _exponents(head_dim))


def _longrope_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position_embeddings))
