"""Memory on the CPU in the largest pages that the system gives. Weights of native kernels have it (BENCHMARKS.md).

Linux gives pages of 2 MiB to whom asks: `transparent_hugepage` is `madvise` on many distributions, `always` on others.
"""

import mmap
import threading
import weakref
from collections import defaultdict, deque
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

CPU = torch.device("cpu")

_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux has it

_LARGE_PAGE = 1 << 21  # of x86-64, and of aarch64 with pages of 4 KiB
# An expert's matrices have 1 to 20 MB. A chunk's end, of which no piece is made, takes no memory but the rest of its
# last page: with chunks of 128 MiB these were 40 MB of 5.8 GB.
_CHUNK = 1 << 29
_LEAST = 1 << 18  # smaller ones come from malloc
_ALIGNMENT = 64


class Arena:
    """Hands out pieces of memory, one behind another.

    A freed piece's memory goes back to the system, its place to the next piece of its size: experts come and go, and
    all of a model are equally large.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk, self._used = mmap.mmap(-1, 1), 0  # none yet
        self._places: defaultdict[int, list[tuple[mmap.mmap, int]]] = defaultdict(list)  # by size
        self._freed: deque[tuple[mmap.mmap, int, int]] = deque()  # finalizers run anywhere, also while the lock is held

    def take(self, num_bytes: int) -> memoryview:
        """num_bytes of memory, which lives as long as the view. Raises OSError where there is none."""
        if num_bytes > _CHUNK // 4:
            chunk, begin = _mapped(num_bytes)
            return memoryview(chunk)[begin : begin + num_bytes]
        size = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        with self._lock:
            while self._freed:
                freed, place, freed_size = self._freed.popleft()
                self._places[freed_size].append((freed, place))
            if self._places[size]:
                chunk, begin = self._places[size].pop()
            else:
                if self._used + size > len(self._chunk):
                    self._chunk, self._used = _mapped(_CHUNK)
                chunk, begin = self._chunk, self._used
                self._used += size
        piece = memoryview(chunk)[begin : begin + num_bytes]
        weakref.finalize(piece, self._give_back, chunk, begin, size).atexit = False
        return piece

    def _give_back(self, chunk: mmap.mmap, begin: int, size: int) -> None:
        first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (begin + size) // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0:
            chunk.madvise(mmap.MADV_DONTNEED, first, length)
        self._freed.append((chunk, begin, size))


def _mapped(num_bytes: int) -> tuple[mmap.mmap, int]:
    """Fresh memory, and where in it the first large page begins."""
    chunk = mmap.mmap(-1, num_bytes + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    assert _ADVICE is not None
    with suppress(OSError):  # a system without large pages
        chunk.madvise(_ADVICE)
    address = torch.frombuffer(chunk, dtype=torch.uint8).data_ptr()
    return chunk, -address % _LARGE_PAGE


_arena = Arena()


def empty(*shape: int, dtype: torch.dtype, device: torch.device = CPU) -> Tensor:
    """As torch.empty; on the CPU in large pages where the system has them."""
    num_bytes = prod(shape) * dtype.itemsize
    if device.type != "cpu" or _ADVICE is None or num_bytes < _LEAST:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(_arena.take(num_bytes), dtype=dtype).view(shape)
