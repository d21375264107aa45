"""Cancels that found no sequence: of requests that are to come, or that have finished. Knows no sequences."""

MAX_CANCELLED_EARLY = 1024  # ids that are kept; most are of finished requests


class EarlyCancels:
    """Used by one thread. The oldest id goes when there are too many."""

    def __init__(self) -> None:
        self._ids: dict[str, None] = {}

    def add(self, request_id: str) -> None:
        self._ids[request_id] = None
        if len(self._ids) > MAX_CANCELLED_EARLY:
            del self._ids[next(iter(self._ids))]

    def take(self, request_id: str) -> bool:
        """Whether a request that comes now was cancelled before."""
        if request_id not in self._ids:
            return False
        del self._ids[request_id]
        return True
