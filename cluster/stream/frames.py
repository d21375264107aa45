"""The format of a stream: a handshake, then frames of a fixed head and a payload. Knows no sockets.

The server greets with a nonce. The client answers with the MAC of that nonce and a nonce of its own, the server with
the MAC of the client's nonce. Neither side ever sends the secret, and nothing else is read from a stranger. All numbers
are little-endian.

T: rows, H: hidden size, K: experts a token. A request's payload is topk_ids [T, K] int32, topk_weights [T, K]
float32, rows [T, H]; an answer's is rows [T, H]; a refusal's is its message in UTF-8. Where both sides share memory
(`region.py`) the rows may lie in one of its slots instead; the head names the slot.
"""

import hashlib
import hmac
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from operator import attrgetter
from typing import Annotated, get_type_hints

import numpy as np
import torch

from cluster.errors import ProtocolError
from cluster.stream.region import NUM_SLOTS, SLOT_BYTES

MAGIC = b"moeX"
VERSION = 2
# Bits of what a side understands. Versions before the first say 0 and read none; no bit changes what stood before it.
SIGNS = 1  # a client understands ALIVE, a server sends it
TRACES = 2  # a server understands TRACE
FEATURES = SIGNS | TRACES
NONCE_BYTES = 32
GREETING = struct.Struct("<4sHH32s")  # server's first words: its FEATURES, its nonce
HELLO = struct.Struct("<4sHH32s32s")  # client's: its FEATURES, its nonce, MAC of the server's
WELCOME = struct.Struct("<4sH2x32s")  # server's answer: MAC of the client's nonce
NO_TIMEOUT = 0xFFFFFFFF
MAX_PAYLOAD_BYTES = 1 << 28  # 8192 rows of Qwen2-57B-A14B in float32 are 0.12 GB

_FOLDED_BYTES = 1 << 12

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Kind(IntEnum):
    """REQUEST, SHARE and TRACE go to the shard, the others come back.

    REFUSED: the frame itself was wrong; the stream ends.
    SHARE: a region's descriptor; the answer is an empty ANSWER, or FAILED if the shard cannot open it.
    ALIVE: a head without payload, while the caller's requests wait and the shard's work goes on.
    TRACE: the spans to which the caller's requests behind it belong (`tracing.contexts.pack`), none in an empty one. To
        shards with the feature TRACES; they answer nothing.
    """

    REQUEST = 1
    ANSWER = 2
    UNAVAILABLE = 3
    FAILED = 4
    REFUSED = 5
    SHARE = 6
    ALIVE = 7
    TRACE = 8


_KINDS = frozenset(Kind)


@dataclass(frozen=True, slots=True)
class StreamOffer:
    """How to reach a shard's stream. Only a Ray call to the shard returns it.

    unix_name: abstract name of a Unix socket, "" where there are none.  node: the host that the name works on.
    """

    unix_name: str
    host: str
    port: int
    node: str
    secret: bytes

    def __repr__(self) -> str:
        return f"StreamOffer({self.unix_name!r}, {self.host}:{self.port})"


@dataclass(slots=True)  # not frozen: each frame makes two, and a frozen one takes 1 µs longer to make
class Header:
    """One frame's head. This class is the table of its fields: their order and `struct` codes on the wire, after MAGIC
    and VERSION, and their defaults.

    dtype: on the wire its place in DTYPES.  request_id: 0 for a frame that answers no request.
    timeout_ms: how long the caller still waits without a word from the shard, NO_TIMEOUT for no bound.
    slot: the slot of the shared memory that the rows lie in, 0 for rows in the payload.
    sent_at: seconds of the sender's wall clock.
    checksum: of the head without it and of the payload; `pack` makes it, `check` compares it.
    """

    kind: Annotated[Kind, "B"]
    dtype: Annotated[torch.dtype, "B"] = torch.float32
    request_id: Annotated[int, "Q"] = 0
    layer_id: Annotated[int, "I"] = 0
    rows: Annotated[int, "I"] = 0
    hidden_size: Annotated[int, "I"] = 0
    topk: Annotated[int, "I"] = 0
    epoch: Annotated[int, "Q"] = 0
    timeout_ms: Annotated[int, "I"] = NO_TIMEOUT
    slot: Annotated[int, "I"] = 0
    sent_at: Annotated[float, "d"] = 0.0
    payload_bytes: Annotated[int, "Q"] = 0
    checksum: Annotated[int, "I"] = 0

    def pack(self, *payload: bytes | memoryview) -> bytes:
        """The head with the checksum of a payload, which comes in the parts that the sender has: a request's in three.
        payload_bytes counts them already."""
        packed = self._pack_unchecked()
        return packed[: -CHECKSUM.size] + CHECKSUM.pack(_checksum(packed, payload))

    def check(self, payload: memoryview) -> None:
        """Raises ProtocolError for a frame that changed on its way."""
        ids_bytes = 4 * self.rows * self.topk if self.kind is Kind.REQUEST else 0
        parts = (payload[:ids_bytes], payload[ids_bytes : 2 * ids_bytes], payload[2 * ids_bytes :])
        if _checksum(self._pack_unchecked(), parts) != self.checksum:
            raise ProtocolError("a frame was damaged on its way: its checksum is another one")

    def _pack_unchecked(self) -> bytes:
        """The head with 0 for its checksum, which comes last."""
        kind, dtype, *numbers, _ = _values(self)
        return HEADER.pack(MAGIC, VERSION, kind, DTYPES.index(dtype), *numbers, 0)

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> "Header":
        """Raises ProtocolError for a foreign, newer or oversized frame, and for sizes that contradict each other."""
        magic, version, kind, dtype, *numbers = HEADER.unpack(data)
        check_version(magic, version)
        if kind not in _KINDS or dtype >= len(DTYPES):
            raise ProtocolError(f"a frame of kind {kind} and dtype {dtype}, which this version does not have")
        head = cls(Kind(kind), DTYPES[dtype], *numbers)
        head._check_sizes()
        return head

    def _check_sizes(self) -> None:
        kind, rows, num_bytes = self.kind, self.rows, self.payload_bytes
        if num_bytes > MAX_PAYLOAD_BYTES:
            raise ProtocolError(f"a frame of {num_bytes} bytes, at most {MAX_PAYLOAD_BYTES} are taken")
        row_bytes = self.hidden_size * self.dtype.itemsize
        if self.slot > NUM_SLOTS or (self.slot and rows * row_bytes > SLOT_BYTES):
            raise ProtocolError(f"{rows} rows of {row_bytes} bytes in slot {self.slot}, which does not hold them")
        rows_bytes = 0 if self.slot else rows * row_bytes
        if kind is Kind.REQUEST and (
            not (rows and self.hidden_size and self.topk) or num_bytes != rows_bytes + rows * 8 * self.topk
        ):
            raise ProtocolError(f"a request of {rows} rows with {num_bytes} bytes, which its shapes do not give")
        if kind is Kind.ANSWER and num_bytes != rows_bytes:
            raise ProtocolError(f"an answer of {rows} rows with {num_bytes} bytes, which its shapes do not give")
        if kind is Kind.ALIVE and num_bytes:
            raise ProtocolError(f"a sign of life with {num_bytes} bytes")


_CODES = {name: hint.__metadata__[0] for name, hint in get_type_hints(Header, include_extras=True).items()}
_NAMES = tuple(_CODES)
_values = attrgetter(*_NAMES)
HEADER = struct.Struct("<4sH" + "".join(_CODES.values()))
CHECKSUM = struct.Struct("<" + _CODES["checksum"])


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
