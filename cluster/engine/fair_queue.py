"""Sequences that wait for their turn: clients in rotation, the sequences of each in the order of their arrival.

A client that sends a thousand requests delays another's first one by one request, not by a thousand.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator
from itertools import chain, islice, zip_longest

from cluster.engine.sequence import Sequence


class FairQueue:
    """Used by one thread."""

    def __init__(self) -> None:
        self._returned: deque[Sequence] = deque()  # had begun and lost their blocks: before all others
        self._clients: OrderedDict[str, deque[Sequence]] = OrderedDict()  # the first one's turn is next
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._returned
        for sequences in self._clients.values():
            yield from sequences

    def append(self, sequence: Sequence) -> None:
        self._clients.setdefault(sequence.request.client, deque()).append(sequence)
        self._length += 1

    def put_back(self, sequence: Sequence) -> None:
        """Takes back a sequence that had its turn and needs another one: it is next."""
        self._returned.appendleft(sequence)
        self._length += 1

    def peek(self) -> Sequence:
        """Returns the sequence that `pop` would take."""
        return self._returned[0] if self._returned else next(iter(self._clients.values()))[0]

    def first(self, limit: int) -> list[Sequence]:
        """Returns the sequences that `pop` would take if it were called `limit` times, in that order."""
        rounds = zip_longest(*self._clients.values())
        in_turn = (sequence for turn in rounds for sequence in turn if sequence is not None)
        return list(islice(chain(self._returned, in_turn), max(0, limit)))

    def pop(self) -> Sequence:
        sequence = self.peek()
        self.take(sequence)
        return sequence

    def take(self, sequence: Sequence) -> None:
        """Takes out a sequence that begins. If it was its client's first, that client's turn is over."""
        client = sequence.request.client
        had_turn = sequence not in self._returned and self._clients[client][0] is sequence
        self.remove(sequence)
        if had_turn and client in self._clients:
            self._clients.move_to_end(client)

    def remove(self, sequence: Sequence) -> None:
        """Raises ValueError for one that is not here."""
        if sequence in self._returned:
            self._returned.remove(sequence)
        else:
            client = sequence.request.client
            sequences = self._clients.get(client, deque())
            sequences.remove(sequence)
            if not sequences:
                del self._clients[client]
        self._length -= 1

    def to_make_room(self, client: str) -> Sequence | None:
        """Returns the waiting sequence whose place a request of `client` may take, or None.

        It is the latest of the client with the most sequences here, if these are at least two more than `client` has.
        A sequence that another replica let in keeps its place.
        """
        largest = max(self._clients.values(), key=len, default=deque())
        if len(largest) < len(self._clients.get(client, ())) + 2:
            return None
        return next((sequence for sequence in reversed(largest) if not sequence.request.num_replays), None)
