"""Records the calls that tests make of the native kernels' plain variant; compares them with a repetition elsewhere.

`pytest -p native_replay` with CALLS in the environment writes a file for tests/native/replay.cpp, and beside it what
each call left behind. Memory is that of the tensors alive: a pointer is stored as a tensor's storage and an offset.
Single calls can be repeated on any processor whose numbers are as this one's: little-endian, 64 bits.
"""

import ctypes
import gc
import os
import pickle
import struct
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.kernels.native import library

CALLS = "MOE_CLUSTER_TEST_CALLS"  # in the environment: the file to write
CALLS_PER_TEST = 8  # of each kernel
CALL_BYTES = 8 << 20
FLOATING = {torch.float32, torch.bfloat16, torch.float16}


@dataclass
class Buffer:
    """A storage. dtypes: of the tensors that lie in it.  pointers: where addresses of other tensors lie in it."""

    address: int
    num_bytes: int
    dtypes: set[torch.dtype] = field(default_factory=set)
    pointers: list[int] = field(default_factory=list)

    def read(self) -> bytes:
        return ctypes.string_at(self.address, self.num_bytes)


@dataclass(frozen=True)
class Call:
    """One call as it ended. after: the bytes of each buffer.  result: None where a kernel returns nothing."""

    test: str
    kernel: str
    buffers: Sequence[Buffer]
    after: Sequence[bytes]
    result: int | None


class Memory:
    """All tensors' storages, by address."""

    def __init__(self) -> None:
        found: dict[int, Buffer] = {}
        for thing in gc.get_objects():
            if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
                storage = thing.untyped_storage()
                if storage.nbytes():
                    buffer = found.setdefault(storage.data_ptr(), Buffer(storage.data_ptr(), storage.nbytes()))
                    buffer.dtypes.add(thing.dtype)
        self._all = [found[address] for address in sorted(found)]
        self._addresses = [buffer.address for buffer in self._all]

    def find(self, address: int) -> Buffer | None:
        index = bisect_right(self._addresses, address) - 1
        buffer = self._all[index] if index >= 0 else None
        return buffer if buffer is not None and address <= buffer.address + buffer.num_bytes else None


class Recorder:
    """Writes calls. Not thread-safe."""

    def __init__(self, path: Path) -> None:
        self.test = ""
        self.skipped: Counter[tuple[str, str]] = Counter()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._file = path.open("wb")
        self._ends = path.with_suffix(".ends").open("wb")

    def wrap(
        self, index: int, name: str, kernel: Callable[..., int | None], types: Sequence[type]
    ) -> Callable[..., int | None]:
        """index: of the kernel in the table."""

        def recorded(*arguments: object) -> int | None:
            begun = None
            if self._counts[self.test, name] < CALLS_PER_TEST and self.skipped[self.test, name] < CALLS_PER_TEST:
                begun = self._begin(index, arguments, types)
                (self.skipped if begun is None else self._counts)[self.test, name] += 1
            result = kernel(*arguments)
            if begun is not None:
                call = Call(self.test, name, begun, [buffer.read() for buffer in begun], result)
                pickle.dump(call, self._ends)
            return result

        return recorded

    def _begin(self, index: int, arguments: Sequence[object], types: Sequence[type]) -> Sequence[Buffer] | None:
        """Writes a call; returns its memory. None for one whose memory is no tensor's, or too much."""
        memory, whole, floating, used = Memory(), [], [], {}
        for argument, kind in zip(arguments, types, strict=True):
            if kind in (ctypes.c_float, ctypes.c_double):
                floating.append(struct.pack("<f4x" if kind is ctypes.c_float else "<d", argument))
            elif kind is not ctypes.c_void_p or not argument:
                whole.append((None, int(argument or 0)))
            else:
                buffer = memory.find(int(argument))
                if buffer is None:
                    return None
                whole.append((buffer, int(argument) - buffer.address))
                used[buffer.address] = buffer
        inside = list(self._pointers_inside(memory, used))
        buffers = list(used.values())
        if sum(buffer.num_bytes for buffer in buffers) > CALL_BYTES:
            return None
        numbers = {buffer.address: number for number, buffer in enumerate(buffers)}
        place = lambda buffer, offset: (-1 if buffer is None else numbers[buffer.address], offset)  # noqa: E731
        self._write(index, len(buffers), len(inside), len(whole), len(floating))
        for buffer in buffers:
            self._write(buffer.num_bytes)
            self._file.write(buffer.read())
        for buffer, offset, target, target_offset in inside:
            self._write(*place(buffer, offset), *place(target, target_offset))
        for buffer, offset in whole:
            self._write(*place(buffer, offset))
        self._file.write(b"".join(floating))
        return buffers

    def _pointers_inside(self, memory: Memory, used: dict[int, Buffer]) -> Iterator[tuple[Buffer, int, Buffer, int]]:
        """Of tensors of int64, which hold other tensors' addresses. Adds them to `used`, by address."""
        waiting = list(used.values())
        while waiting:
            buffer = waiting.pop()
            if torch.int64 not in buffer.dtypes:
                continue
            for number, value in enumerate(np.frombuffer(buffer.read(), np.int64)):
                target = memory.find(int(value)) if value > 1 << 20 else None
                if target is not None:
                    if target.address not in used:
                        used[target.address] = target
                        waiting.append(target)
                    buffer.pointers.append(8 * number)
                    yield buffer, 8 * number, target, int(value) - target.address

    def _write(self, *numbers: int) -> None:
        self._file.write(struct.pack(f"<{len(numbers)}q", *numbers))

    def close(self) -> None:
        self._write(0)
        self._file.close()
        pickle.dump(self.skipped, self._ends)
        self._ends.close()


def pytest_configure(config: pytest.Config) -> None:
    if CALLS not in os.environ:
        return
    recorder = Recorder(Path(os.environ[CALLS]))
    original = library.Native.__init__

    def recording(self: library.Native, variant: str, table: int) -> None:
        original(self, variant, table)
        if variant == "plain":
            for index, (name, _, types) in enumerate(library._SIGNATURES, 1):
                setattr(self, name, recorder.wrap(index, name, getattr(self, name), types))

    library.Native.__init__ = recording  # type: ignore[method-assign]
    gc.freeze()  # `Memory` does not look at all that torch has made until now
    config.pluginmanager.register(Following(recorder))


class Following:
    """Tells the recorder which test runs."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self._recorder.test = item.name

    def pytest_unconfigure(self) -> None:
        self._recorder.close()


def recorded_calls(calls: Path) -> tuple[list[Call], set[str]]:
    """The calls' ends, and the kernels of which no call could be written."""
    with calls.with_suffix(".ends").open("rb") as ends:
        found = []
        while isinstance(entry := pickle.load(ends), Call):
            found.append(entry)
    return found, {name for _, name in entry} - {call.kernel for call in found}


def differences(calls: Sequence[Call], data: bytes) -> list[tuple[str, str]]:
    """Kernel and text of each difference between the calls and their repetition, of which `data` are the results.

    Every bit counts, but a NaN is equal to another one: its sign and its other bits are its processor's.
    """
    found = []
    at = 0

    def take(num_bytes: int) -> bytes:
        nonlocal at
        at += num_bytes
        return data[at - num_bytes : at]

    for call in calls:
        result = int.from_bytes(take(8), "little", signed=True)
        if call.result is not None and result & 0xFFFFFFFF != call.result & 0xFFFFFFFF:
            found.append((call.kernel, f"{call.test}: returned {result}, not {call.result}"))
        for number, buffer in enumerate(call.buffers):
            repeated = take(buffer.num_bytes)
            # Scratch memory is of bytes, and how threads share it out is their matter.
            if buffer.dtypes != {torch.uint8} and not _equal(buffer, call.after[number], repeated):
                dtypes = ", ".join(map(str, buffer.dtypes))
                found.append((call.kernel, f"{call.test}: left other numbers in buffer {number} ({dtypes})"))
    assert at == len(data)
    return found


def _equal(buffer: Buffer, after: bytes, repeated: bytes) -> bool:
    if after == repeated:
        return True
    differ = np.frombuffer(after, np.uint8) != np.frombuffer(repeated, np.uint8)
    for offset in buffer.pointers:
        differ[offset : offset + 8] = False
    for dtype in buffer.dtypes & FLOATING:
        width = dtype.itemsize
        end = len(after) // width * width
        is_nan = [torch.frombuffer(bytearray(b[:end]), dtype=dtype).isnan().numpy() for b in (after, repeated)]
        differ[:end] &= ~np.repeat(is_nan[0] & is_nan[1], width)
    return not differ.any()
