"""Plain reads of memory: the bound of a kernel that reads weights."""

import os
from collections.abc import Mapping, Sequence

import torch

from cluster.bench.kernels.case import TORCH, Call, Case
from cluster.kernels.native.library import Native

_LEAST_BYTES = 512 << 20
_MOST_TURNS = 256
_LEAST_PIECE = 64 << 20
_CACHE_LEVELS = (2, 3, 4)


def bytes_beyond_caches() -> int:
    """More than the caches hold, several times over."""
    sizes = [os.sysconf(name) for level in _CACHE_LEVELS if (name := f"SC_LEVEL{level}_CACHE_SIZE") in os.sysconf_names]
    return max(_LEAST_BYTES, 8 * max(sizes, default=0))


def num_turns(num_bytes: int) -> int:
    """Buffers of so many bytes to visit in turn, so that each has left the caches when it comes again (but for those of
    a toy model)."""
    return min(_MOST_TURNS, -(-bytes_beyond_caches() // 2 // num_bytes))


class Reading:
    """A buffer, and the ways to read it piece by piece; none is the fastest on every machine."""

    def __init__(self, kernels: Mapping[str, Native]) -> None:
        self._buffer = torch.ones(bytes_beyond_caches() // 8, dtype=torch.int64)
        self._kernels = kernels

    def case(self, num_bytes: float, chosen: str) -> Case:
        """num_bytes: of a piece, which has _LEAST_PIECE at least, so that starting the threads is not what is timed."""
        length = min(max(int(num_bytes), _LEAST_PIECE) // 8, len(self._buffer))
        pieces = [self._buffer[i * length : (i + 1) * length] for i in range(len(self._buffer) // length)]
        ways: dict[str, Call] = {
            f"{TORCH} int64": lambda turn: pieces[turn % len(pieces)].sum(),
            f"{TORCH} float32": lambda turn: pieces[turn % len(pieces)].view(torch.float32).sum(),
            f"{TORCH} max": lambda turn: pieces[turn % len(pieces)].max(),
        }
        ways |= {name: _reader(native, pieces) for name, native in self._kernels.items()}
        size = f"{len(pieces)} x {pieces[0].nbytes >> 20} MiB"
        return Case(kernel="read", size=size, ways=ways, num_bytes=pieces[0].nbytes, num_flops=0.0, chosen=chosen)


def _reader(native: Native, pieces: Sequence[torch.Tensor]) -> Call:
    def call(turn: int) -> int:
        piece = pieces[turn % len(pieces)]
        return native.read(piece.data_ptr(), piece.nbytes, torch.get_num_threads())

    return call
