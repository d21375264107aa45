"""The blocks of one group of layers: who holds each, and which full ones can be found again. No tensors."""


class BlockPool:
    """Block ids 0 … num_blocks − 1.

    window: of the group's layers in tokens (a token sees itself and window − 1 before it), None where all are seen.
    A block with a digest stays findable when its last holder is gone, until its memory is needed: the one that was let
    go longest ago is taken first.
    """

    def __init__(self, num_blocks: int, window: int | None = None) -> None:
        self.num_blocks = num_blocks
        self.window = window
        self._free = list(range(num_blocks - 1, -1, -1))
        self._num_holders = [0] * num_blocks
        self._idle: dict[int, None] = {}  # findable blocks that nobody holds, longest idle first
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def take(self) -> int:
        """A block for a new holder; there must be a free one."""
        block_id = self._free.pop() if self._free else self._evict()
        self._num_holders[block_id] = 1
        return block_id

    def let_go(self, block_id: int) -> None:
        """Takes a block back from one of its holders."""
        self._num_holders[block_id] -= 1
        if self._num_holders[block_id]:
            return
        if block_id in self._digest_of:
            self._idle[block_id] = None
        else:
            self._free.append(block_id)

    def find(self, digest: bytes) -> int | None:
        return self._block_of.get(digest)

    def hold(self, block_id: int) -> None:
        """Gives a found block one holder more."""
        self._idle.pop(block_id, None)
        self._num_holders[block_id] += 1

    def remember(self, block_id: int, digest: bytes) -> None:
        """Makes a block findable, unless another one is by that digest."""
        if digest not in self._block_of:
            self._block_of[digest] = block_id
            self._digest_of[block_id] = digest

    def disown(self, block_id: int, digest: bytes) -> None:
        """Makes a block unfindable, if it is the one that has the digest."""
        if self._digest_of.get(block_id) != digest:
            return
        del self._block_of[self._digest_of.pop(block_id)]
        if block_id in self._idle:
            del self._idle[block_id]
            self._free.append(block_id)

    def _evict(self) -> int:
        block_id = next(iter(self._idle))
        del self._idle[block_id]
        del self._block_of[self._digest_of.pop(block_id)]
        return block_id
