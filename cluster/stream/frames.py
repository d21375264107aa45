"""What goes over a stream: a handshake, then frames of a fixed header and a payload. Knows no sockets.

The server greets with a nonce, the client answers it with the secret's MAC and a nonce of its own, and gets that one's
MAC: neither side ever sends the secret, and nothing else is read from a stranger. All numbers are little-endian.

T: rows, H: hidden size, K: experts a token. A request's payload is topk_ids [T, K] int32, topk_weights [T, K]
float32, rows [T, H]; an answer's is rows [T, H]; a refusal's is its message in UTF-8. Where both sides share memory
(`region.py`) the rows may lie in one of its slots instead, which the head then names.
"""

import hashlib
import hmac
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from cluster.errors import ProtocolError
from cluster.stream.region import NUM_SLOTS, SLOT_BYTES

MAGIC = b"moeX"
VERSION = 2
FEATURES = 1  # bits; 1: a client understands ALIVE, a server sends it. Those before there were any say 0 and read none.
NONCE_BYTES = 32
GREETING = struct.Struct("<4sHH32s")  # server's first words: its FEATURES, its nonce
HELLO = struct.Struct("<4sHH32s32s")  # client's: its FEATURES, its nonce, MAC of the server's
WELCOME = struct.Struct("<4sH2x32s")  # server's answer: MAC of the client's nonce
HEADER = struct.Struct("<4sHBBQIIIIQIIdQI")
NO_TIMEOUT = 0xFFFFFFFF
MAX_PAYLOAD_BYTES = 1 << 28  # 8192 rows of Qwen2-57B-A14B in float32 are 0.12 GB

_FOLDED_BYTES = 1 << 12

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Kind(IntEnum):
    """REQUEST and SHARE go to the shard, the others come back. REFUSED: the frame itself was wrong, the stream ends.
    SHARE: a region's descriptor; answered by an empty ANSWER, or FAILED where it cannot be opened.
    ALIVE: nothing but a head, while the caller's requests wait and the shard's work goes on."""

    REQUEST = 1
    ANSWER = 2
    UNAVAILABLE = 3
    FAILED = 4
    REFUSED = 5
    SHARE = 6
    ALIVE = 7


@dataclass(frozen=True, slots=True)
class StreamOffer:
    """How to reach a shard's stream; only its owner's Ray hands it out.

    unix_name: abstract name of a Unix socket, "" where there are none; it works within one host.  node: whose it is.
    """

    unix_name: str
    host: str
    port: int
    node: str
    secret: bytes

    def __repr__(self) -> str:
        return f"StreamOffer({self.unix_name!r}, {self.host}:{self.port})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """One frame's head. timeout_ms: what is left of the caller's time, NO_TIMEOUT for no bound.
    What the shard sends renews it.
    slot: where in the shared memory the rows lie, 0 for the payload.  sent_at: seconds of the sender's wall clock.
    checksum: of the head without it and the payload; made by `pack`, compared by `check`."""

    kind: Kind
    request_id: int
    payload_bytes: int
    dtype: torch.dtype = torch.float32
    layer_id: int = 0
    rows: int = 0
    hidden_size: int = 0
    topk: int = 0
    epoch: int = 0
    timeout_ms: int = NO_TIMEOUT
    slot: int = 0
    sent_at: float = 0.0
    checksum: int = 0

    def pack(self, *payload: bytes | memoryview) -> bytes:
        """With the checksum of a payload, whose bytes are counted already. A request's has three parts."""
        return self._pack(_checksum(self._pack(0), payload))

    def check(self, payload: memoryview) -> None:
        """Raises ProtocolError for a frame that changed on its way."""
        ids_bytes = 4 * self.rows * self.topk if self.kind is Kind.REQUEST else 0
        parts = (payload[:ids_bytes], payload[ids_bytes : 2 * ids_bytes], payload[2 * ids_bytes :])
        if _checksum(self._pack(0), parts) != self.checksum:
            raise ProtocolError("a frame was damaged on its way: its checksum is another one")

    def _pack(self, checksum: int) -> bytes:
        return HEADER.pack(
            MAGIC, VERSION, self.kind, DTYPES.index(self.dtype), self.request_id, self.layer_id, self.rows,
            self.hidden_size, self.topk, self.epoch, self.timeout_ms, self.slot, self.sent_at,
            self.payload_bytes, checksum,
        )  # fmt: skip

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> "Header":
        """Raises ProtocolError for a foreign, newer or oversized frame, and for sizes that contradict each other."""
        (magic, version, kind, dtype, request_id, layer_id, rows, hidden_size, topk, epoch, timeout_ms, slot, sent_at,
         payload_bytes, checksum) = HEADER.unpack(data)  # fmt: skip
        check_version(magic, version)
        if kind not in Kind.__members__.values() or dtype >= len(DTYPES):
            raise ProtocolError(f"a frame of kind {kind} and dtype {dtype}, which this version does not have")
        if payload_bytes > MAX_PAYLOAD_BYTES:
            raise ProtocolError(f"a frame of {payload_bytes} bytes, at most {MAX_PAYLOAD_BYTES} are taken")
        row_bytes = hidden_size * DTYPES[dtype].itemsize
        if slot > NUM_SLOTS or (slot and rows * row_bytes > SLOT_BYTES):
            raise ProtocolError(f"{rows} rows of {row_bytes} bytes in slot {slot}, which does not hold them")
        rows_bytes = 0 if slot else rows * row_bytes
        if kind == Kind.REQUEST and (
            not (rows and hidden_size and topk) or payload_bytes != rows_bytes + rows * 8 * topk
        ):
            raise ProtocolError(f"a request of {rows} rows with {payload_bytes} bytes, which its shapes do not give")
        if kind == Kind.ANSWER and payload_bytes != rows_bytes:
            raise ProtocolError(f"an answer of {rows} rows with {payload_bytes} bytes, which its shapes do not give")
        if kind == Kind.ALIVE and payload_bytes:
            raise ProtocolError(f"a sign of life with {payload_bytes} bytes")
        return cls(
            kind=Kind(kind), request_id=request_id, payload_bytes=payload_bytes, dtype=DTYPES[dtype],
            layer_id=layer_id, rows=rows, hidden_size=hidden_size, topk=topk, epoch=epoch, timeout_ms=timeout_ms,
            slot=slot, sent_at=sent_at, checksum=checksum,
        )  # fmt: skip


def _checksum(head: bytes, payload: Sequence[bytes | memoryview]) -> int:
    """CRC-32, at 3 GB/s; of larger parts only that of their 64-bit words' exclusive or, at 37 GB/s (Zen 4)."""
    crc = zlib.crc32(head)
    for part in payload:
        if len(part) > _FOLDED_BYTES:
            whole = len(part) // 8 * 8
            folded = np.bitwise_xor.reduce(np.frombuffer(part[:whole], dtype=np.uint64))
            crc = zlib.crc32(int(folded).to_bytes(8, "little"), crc)
            part = part[whole:]
        crc = zlib.crc32(part, crc)
    return crc


def check_version(magic: bytes, version: int) -> None:
    """Raises ProtocolError for another protocol, or another version of this one."""
    if magic != MAGIC:
        raise ProtocolError("the other side does not speak this protocol")
    if version != VERSION:
        raise ProtocolError(f"the other side speaks version {version} of the stream protocol, this one {VERSION}")


def mac(secret: bytes, role: bytes, nonce: bytes) -> bytes:
    """[32 bytes]. role: "client" or "server", so that neither can send the other's words back."""
    return hmac.new(secret, role + nonce, hashlib.sha256).digest()


def memory(rows: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return rows.view(torch.uint8).numpy().data.cast("B")


class ReceiveBuffers:
    """Memory for payloads, used again and again. On a CUDA host it is pinned, for copies at full speed."""

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._free: list[Tensor] = []

    def take(self, num_bytes: int) -> Tensor:
        """At least num_bytes of uint8, with what they last held."""
        for i, buffer in enumerate(self._free):
            if buffer.numel() >= num_bytes:
                return self._free.pop(i)
        if self._free:
            self._free.pop()  # too small for what comes now: let it go
        return torch.empty(1 << max(num_bytes - 1, 4095).bit_length(), dtype=torch.uint8, pin_memory=self._pinned)

    def give(self, buffer: Tensor) -> None:
        self._free.append(buffer)


class Staging:
    """Pinned memory for rows on their way from a GPU to a socket; a CPU tensor's are sent as they are."""

    def __init__(self) -> None:
        self._pinned = ReceiveBuffers(True)

    def copy(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """[T, H] contiguous on the CPU, from a GPU once the current stream has come so far; and the memory to give
        back when they are sent, if any."""
        if not rows.is_cuda:
            return rows.contiguous(), None
        buffer = self._pinned.take(rows.nbytes)
        staged = buffer[: rows.nbytes].view(rows.dtype).view(rows.shape)
        return staged.copy_(rows, non_blocking=True), buffer

    def give_back(self, buffer: Tensor | None) -> None:
        if buffer is not None:
            self._pinned.give(buffer)
