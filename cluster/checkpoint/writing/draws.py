"""Random numbers that depend on a seed and a name alone: the same on every machine, in any order, in any version.

Only raw bits of numpy's SFC64 are used, which numpy keeps as they are; its distributions may change. Numbers are
normal by a table of 65,536 quantiles, rounded to 2 ** -16: the last bit of a machine's logarithm is not in them.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_LEVELS = 1 << 16


@dataclass(frozen=True, slots=True)
class Draws:
    """normal: [65536] float32, quantiles of the standard normal distribution. May be used from several threads."""

    seed: int
    normal: NDArray[np.float32]

    @classmethod
    def of(cls, seed: int) -> Self:
        quantiles = torch.special.ndtri((torch.arange(_LEVELS, dtype=torch.float64) + 0.5) / _LEVELS)
        return cls(seed, ((quantiles * _LEVELS).round() / _LEVELS).float().numpy())

    def permutation(self, name: str, size: int) -> Tensor:
        """A random order of the numbers below `size`: [size] int64."""
        return torch.from_numpy(np.argsort(self._words(name, size), kind="stable"))

    def normals(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal numbers of a shape, float32."""
        size = int(np.prod(shape))
        return torch.from_numpy(self.normal[self._sixteen_bits(name, size)]).view(shape)

    def mask(self, name: str, shape: tuple[int, ...], share: float) -> Tensor:
        """A bool tensor of a shape, True for each element with the probability `share` (in steps of 2 ** -16)."""
        size = int(np.prod(shape))
        return torch.from_numpy(self._sixteen_bits(name, size) < round(share * _LEVELS)).view(shape)

    def _sixteen_bits(self, name: str, size: int) -> NDArray[np.uint16]:
        return self._words(name, -(-size // 4)).astype("<u8").view("<u2")[:size]

    def _words(self, name: str, size: int) -> NDArray[Any]:
        """[size] uint64."""
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        return np.random.SFC64(int.from_bytes(digest)).random_raw(size)
