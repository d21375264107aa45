"""The blocks of one sequence in one group of layers, in the order of its tokens. Knows no pool."""

import numpy as np

_FIRST_ROOM = 16


class BlockTable:
    """Ids of blocks; the first `num_dropped` ones were given back, and are no longer this sequence's.

    Kept as an array that grows: a step copies the part that it needs without looking at each block.
    """

    __slots__ = ("_ids", "_length", "num_dropped")

    def __init__(self) -> None:
        self._ids = np.empty(_FIRST_ROOM, dtype=np.int64)
        self._length = 0
        self.num_dropped = 0

    def __len__(self) -> int:
        """The number of blocks up to the last one, the dropped ones included."""
        return self._length

    @property
    def num_held(self) -> int:
        return self._length - self.num_dropped

    def append(self, block_id: int) -> None:
        if self._length == len(self._ids):
            self._ids = np.concatenate((self._ids, np.empty_like(self._ids)))
        self._ids[self._length] = block_id
        self._length += 1

    def skip(self, num_blocks: int) -> None:
        """Begins a table behind blocks that the sequence does not need."""
        assert not self._length
        for _ in range(num_blocks):
            self.append(-1)
        self.num_dropped = num_blocks

    def drop(self) -> int:
        """Gives its first held block back; returns the id."""
        self.num_dropped += 1
        return int(self._ids[self.num_dropped - 1])

    def id_of(self, index: int) -> int:
        """The id of a block, also of one that was dropped since."""
        assert index < self._length
        return int(self._ids[index])

    def held(self, stop: int | None = None) -> np.ndarray:
        """A view of the held ids up to the block `stop`: [stop − num_dropped] int64."""
        return self._ids[self.num_dropped : self._length if stop is None else stop]

    def clear(self) -> None:
        self._length = self.num_dropped = 0
