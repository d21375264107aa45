"""Memory that a caller and a shard of one host share: each side reads the rows in place, no socket carries them.

On the CPU it is a sealed memory file, whose descriptor goes over the Unix socket once. On a GPU it is the caller's
memory, which the shard opens through CUDA IPC. The caller owns it and names with each request the slot of its rows; the
answer comes back in the same slot. Frames announce the rows, and so give reads and writes their order.
"""

import fcntl
import json
import mmap
import os
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from cluster.errors import ProtocolError

SLOT_BYTES = 1 << 24  # 2048 rows of Qwen2-57B-A14B in bfloat16 are 14.7 MB; memory that nobody touches costs nothing
NUM_SLOTS = 4  # two micro-batches under way, and two whose answers are late
REGION_BYTES = SLOT_BYTES * NUM_SLOTS

_ADD_SEALS, _GET_SEALS = 1033, 1034  # Linux, fcntl.h; Python 3.11 has no names for them
_SHRINK, _GROW, _SEAL = 2, 4, 1
_SEALS = _SHRINK | _GROW | _SEAL  # a file that shrinks under its reader kills the reader with SIGBUS


class Region:
    """memory: [REGION_BYTES] uint8, seen by both sides.  descriptor: how the other side opens it.
    fds: file descriptors for that; this object closes them in `close_fds`."""

    def __init__(self, memory: Tensor, descriptor: bytes = b"", fds: Sequence[int] = ()) -> None:
        self.memory = memory
        self.descriptor = descriptor
        self.fds = tuple(fds)
        self._free = list(range(NUM_SLOTS, 0, -1))

    def take(self, num_bytes: int) -> int:
        """A slot's number, from 1; 0 if the rows do not fit or no slot is free. The slot given last is taken first."""
        return self._free.pop() if self._free and num_bytes <= SLOT_BYTES else 0

    @property
    def has_free(self) -> bool:
        return bool(self._free)

    def give(self, slot: int) -> None:
        self._free.append(slot)

    def rows(self, slot: int, num_rows: int, hidden_size: int, dtype: torch.dtype) -> Tensor:
        """[num_rows, hidden_size] at the beginning of a slot."""
        start = (slot - 1) * SLOT_BYTES
        return self.memory[start : start + num_rows * hidden_size * dtype.itemsize].view(dtype).view(num_rows, -1)

    def close_fds(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds = ()


def make_region(device: torch.device) -> Region | None:
    """The caller's end; None where no memory can be shared with another process."""
    if device.type == "cuda":
        return _make_on_cuda(device)
    if sys.platform != "linux":
        return None
    fd = os.memfd_create("moe-cluster-rows", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, REGION_BYTES)
    fcntl.fcntl(fd, _ADD_SEALS, _SEALS)
    return Region(_map(fd), json.dumps({"kind": "file"}).encode(), (fd,))


def open_region(descriptor: bytes, fds: Sequence[int], device: torch.device) -> Region:
    """The shard's end, from the caller's descriptor. device: where the shard computes. The caller keeps the fds.

    Raises ProtocolError for a descriptor that names no region, or one that cannot be opened from here.
    """
    try:
        parts = json.loads(descriptor)
        if parts["kind"] == "file" and len(fds) == 1:
            if fcntl.fcntl(fds[0], _GET_SEALS) & _SEALS != _SEALS or os.fstat(fds[0]).st_size != REGION_BYTES:
                raise ProtocolError("the caller's memory file is not sealed or has another size")
            return Region(_map(fds[0]))
        if parts["kind"] == "cuda" and device.type == "cuda":
            return _open_on_cuda(parts, device)
    except (ValueError, KeyError, TypeError, OSError, RuntimeError) as error:
        raise ProtocolError(f"the caller's memory cannot be opened: {error}") from error
    raise ProtocolError(f"memory of kind {parts['kind']!r} is not shared with a shard on {device.type}")


def _map(fd: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(fd, REGION_BYTES), dtype=torch.uint8)  # unmapped with its last view


# The eight parts of a storage that another process opens, as `torch.multiprocessing` passes them on (torch 2.13,
# multiprocessing/reductions.py); here as JSON, since nothing that arrives from a socket is unpickled.
_CUDA_PARTS = (
    "device", "handle", "size_bytes", "offset_bytes", "counter_handle", "counter_offset", "event", "event_sync",
)  # fmt: skip


def _make_on_cuda(device: torch.device) -> Region | None:
    memory = torch.empty(REGION_BYTES, dtype=torch.uint8, device=device)
    parts = dict(zip(_CUDA_PARTS, memory.untyped_storage()._share_cuda_(), strict=True))  # type: ignore[no-untyped-call]
    for name in ("handle", "counter_handle", "event"):
        parts[name] = parts[name].hex()
    return Region(memory, json.dumps({"kind": "cuda", **parts}).encode())


def _open_on_cuda(parts: dict[str, object], device: torch.device) -> Region:
    values = [bytes.fromhex(str(parts[name])) if name in ("handle", "counter_handle", "event") else parts[name]
              for name in _CUDA_PARTS[1:]]  # fmt: skip
    with torch.cuda.device(device):
        # Opened as memory of the shard's own GPU: the caller's need not be visible here (CUDA 10.1 and later).
        storage = torch.UntypedStorage._new_shared_cuda(torch.cuda.current_device(), *values)
    memory = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
    if memory.numel() != REGION_BYTES:
        raise ProtocolError(f"the caller's memory has {memory.numel()} bytes, {REGION_BYTES} are needed")
    return Region(memory)
