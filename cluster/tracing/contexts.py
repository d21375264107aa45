"""A place in a trace on its way between processes: a W3C `traceparent`, and many of them packed.

Only spans that are recorded travel: "" stands for none. Loads no OpenTelemetry.
"""

import struct
from collections.abc import Iterable
from typing import NamedTuple

_PACKED = struct.Struct(">16s8s")


class Place(NamedTuple):
    """A span, by the numbers of its trace and itself."""

    trace_id: int
    span_id: int

    @property
    def traceparent(self) -> str:
        """Of a recorded span, as W3C's header writes it."""
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-01"


def place_of(traceparent: str) -> Place | None:
    """The place that `Place.traceparent` wrote; None for "", and for what another version may have written."""
    parts = traceparent.split("-")
    try:
        return Place(int(parts[1], 16), int(parts[2], 16))
    except (IndexError, ValueError):
        return None


def pack(places: Iterable[Place]) -> bytes:
    """24 bytes each."""
    return b"".join(_PACKED.pack(trace_id.to_bytes(16), span_id.to_bytes(8)) for trace_id, span_id in places)


def unpack(packed: bytes) -> list[Place]:
    """What `pack` packed; bytes behind the last whole one are left out."""
    whole = len(packed) - len(packed) % _PACKED.size
    return [
        Place(int.from_bytes(trace_id), int.from_bytes(span_id))
        for trace_id, span_id in _PACKED.iter_unpack(packed[:whole])
    ]
