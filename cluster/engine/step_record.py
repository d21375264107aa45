"""The requests that an engine computes right now, for another process of its host to read when the engine has died.

A file in memory that the reader makes and the engine opens through /proc: nothing of it stays behind.
"""

import mmap
import os
import struct
import sys
from collections.abc import Sequence

_HEADER = struct.Struct("<II")  # sequences, bytes of their ids; the bytes follow
_BYTES_PER_SEQUENCE = 256


class StepRecord:
    """Written by one thread; read after the writer's end, or while it hangs."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._memory = mmap.mmap(fd, os.fstat(fd).st_size)

    @property
    def path(self) -> str:
        """Its path for another process, which can open it as long as this one lives."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def write(self, request_ids: Sequence[str]) -> None:
        """Notes that a step with these begins. Ids without room are counted only."""
        ids, room = "\n".join(request_ids).encode(), len(self._memory) - _HEADER.size
        if len(ids) > room:
            ids = ids[:room].rpartition(b"\n")[0]
        self._memory[: _HEADER.size] = _HEADER.pack(0, 0)  # a half-written record says nothing
        self._memory[_HEADER.size : _HEADER.size + len(ids)] = ids
        self._memory[: _HEADER.size] = _HEADER.pack(len(request_ids), len(ids))

    def num_beside(self, request_id: str) -> int | None:
        """Returns the number of sequences of the last step if this one is among them; 0 if not, None if unknown."""
        num_sequences: int
        num_sequences, num_bytes = _HEADER.unpack(self._memory[: _HEADER.size])
        ids = self._memory[_HEADER.size : _HEADER.size + num_bytes].decode(errors="replace").split("\n")
        if request_id in ids:
            return num_sequences
        return 0 if len(ids) == num_sequences else None


def make_step_record(max_num_seqs: int) -> StepRecord | None:
    """None where processes share no memory by name."""
    if sys.platform != "linux":
        return None
    fd = os.memfd_create("moe-cluster-step", os.MFD_CLOEXEC)
    os.ftruncate(fd, _HEADER.size + max_num_seqs * _BYTES_PER_SEQUENCE)
    return StepRecord(fd)


def open_step_record(path: str) -> StepRecord:
    return StepRecord(os.open(path, os.O_RDWR | os.O_CLOEXEC))
