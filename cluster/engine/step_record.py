"""Whom an engine computes right now, where another process of its host can read it when the engine has died.

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
        """Where another process opens it, for as long as this one lives."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def write(self, request_ids: Sequence[str]) -> None:
        """A step with these begins. Ids that find no place are counted only."""
        ids, room = "\n".join(request_ids).encode(), len(self._memory) - _HEADER.size
        if len(ids) > room:
            ids = ids[:room].rpartition(b"\n")[0]
        self._memory[: _HEADER.size] = _HEADER.pack(0, 0)  # whoever reads a half-written one knows nothing
        self._memory[_HEADER.size : _HEADER.size + len(ids)] = ids
        self._memory[: _HEADER.size] = _HEADER.pack(len(request_ids), len(ids))

    def num_beside(self, request_id: str) -> int | None:
        """How many sequences the last step has or had, that one among them; 0 without it, None if nobody knows."""
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
