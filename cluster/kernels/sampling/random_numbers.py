"""Random numbers that depend on nothing but a seed and a position: Philox 4x64, a counter-based generator.

A sequence that is replayed elsewhere from its tokens goes on with the same numbers.
Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (2011); NumPy's `Philox`.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = (np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157))
_WEYL = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B))
_ROUNDS = 10
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), by NumPy: the definition."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position << 64)).random())


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """`uniform` of each pair, all at once: a generator takes 15 us to make. [B] each."""
    keys = [np.array(seeds, dtype=np.uint64), np.zeros(len(seeds), dtype=np.uint64)]
    # NumPy counts up before its first number.
    a, b = np.ones(len(seeds), dtype=np.uint64), np.array(positions, dtype=np.uint64)
    c, d = np.zeros_like(a), np.zeros_like(a)
    for number in range(_ROUNDS):
        if number:
            keys = [key + weyl for key, weyl in zip(keys, _WEYL, strict=True)]
        high_a, high_c = _high_product(a, _MULTIPLIERS[0]), _high_product(c, _MULTIPLIERS[1])
        a, b, c, d = high_c ^ b ^ keys[0], c * _MULTIPLIERS[1], high_a ^ d ^ keys[1], a * _MULTIPLIERS[0]
    numbers: NDArray[np.float64] = (a >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


def _high_product(x: NDArray[np.uint64], y: np.uint64) -> NDArray[np.uint64]:
    """The upper 64 of a product's 128 bits."""
    x_low, x_high, y_low, y_high = x & _LOW, x >> _HALF, y & _LOW, y >> _HALF
    middle = x_high * y_low + (x_low * y_low >> _HALF)
    other = x_low * y_high + (middle & _LOW)
    high: NDArray[np.uint64] = x_high * y_high + (middle >> _HALF) + (other >> _HALF)
    return high
