"""The spans to which a caller's next requests belong, and whether the shard has heard of them. Knows no socket."""

from cluster.stream.frames import Header, Kind


class SpanNews:
    """Of one connection. Nothing is told twice, and nothing is left out that a request behind it depends on."""

    def __init__(self) -> None:
        self._last = self._current = b""

    @property
    def is_told(self) -> bool:
        return self._current == self._last

    def follow(self, places: bytes) -> None:
        """places: packed; none where the next requests are not traced."""
        self._current = places

    def frames(self) -> list[memoryview]:
        """Those to send in front of the next request; they count as told then."""
        if self.is_told:
            return []
        self._last = self._current
        head = Header(kind=Kind.TRACE, payload_bytes=len(self._last))
        return [memoryview(head.pack(self._last) + self._last)]
