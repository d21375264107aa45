"""Counts the blocks of the KV cache, and knows which full ones can serve a sequence that begins alike. No tensors."""

from array import array
from collections.abc import Callable
from hashlib import blake2b

from cluster.engine.sequence import Sequence


class BlockManager:
    """Hands out block ids 0 … num_blocks − 1 and takes them back.

    frequency_length: as of `RopeConfig`, 0 where keys do not depend on their sequence's length.

    A full block is known by a digest of its sequence's salt, of all tokens up to its end and of the lengths that their
    keys depend on. It stays findable when its
    last holder is gone, until its memory is needed: the one that was let go longest ago is taken first.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        prefix_caching: bool = False,
        frequency_length: Callable[[int], int] = lambda _: 0,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._frequency_length = frequency_length
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

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        """Gives a sequence blocks for its first `num_tokens` tokens; without room changes nothing and returns False."""
        missing = self.blocks_for(num_tokens) - len(sequence.block_table)
        if missing > self.num_free:
            return False
        for _ in range(missing):
            block_id = self._free.pop() if self._free else self._evict()
            self._num_holders[block_id] = 1
            sequence.block_table.append(block_id)
        return True

    def reuse(self, sequence: Sequence) -> int:
        """Gives a sequence without blocks those that hold its beginning, all but its last token at most.

        Sets its num_computed_tokens; returns it. One whose result needs all its rows gets none.
        """
        assert not sequence.block_table
        if self.prefix_caching and not sequence.wants_every_row:
            for _ in range((len(sequence.token_ids) - 1) // self.block_size):
                digest = self._next_digest(sequence)
                block_id = self._block_of.get(digest)
                if block_id is None:
                    break
                self._idle.pop(block_id, None)
                self._num_holders[block_id] += 1
                sequence.block_table.append(block_id)
                sequence.block_digests.append(digest)
        sequence.num_reused_blocks = len(sequence.block_table)
        sequence.num_computed_tokens = len(sequence.block_table) * self.block_size
        return sequence.num_computed_tokens

    def remember(self, sequence: Sequence) -> None:
        """Makes a sequence's full, computed blocks findable: one digest a block. Call it after each step.

        A sequence that NaN does not end shares none: no other may read blocks with NaN.
        """
        if not self.prefix_caching or sequence.keeps_non_finite:
            return
        while len(sequence.block_digests) < sequence.num_computed_tokens // self.block_size:
            digest = self._next_digest(sequence)
            block_id = sequence.block_table[len(sequence.block_digests)]
            sequence.block_digests.append(digest)
            if digest not in self._block_of:
                self._block_of[digest] = block_id
                self._digest_of[block_id] = digest

    def disown(self, sequence: Sequence) -> None:
        """Makes the blocks that a sequence has computed unfindable; those that it found stay findable."""
        for block_id in sequence.block_table[sequence.num_reused_blocks :]:
            if (digest := self._digest_of.pop(block_id, None)) is not None:
                del self._block_of[digest]

    def free(self, sequence: Sequence) -> None:
        """Takes all blocks of a sequence back, its last first: beginnings are shared more often than ends."""
        for block_id in reversed(sequence.block_table):
            self._num_holders[block_id] -= 1
            if self._num_holders[block_id]:
                continue
            if block_id in self._digest_of:
                self._idle[block_id] = None
            else:
                self._free.append(block_id)
        sequence.block_table.clear()
        sequence.block_digests.clear()
        sequence.num_reused_blocks = 0

    def _next_digest(self, sequence: Sequence) -> bytes:
        """Of the first block that has none yet: over its tokens, the length of the sequence for the first of them (the
        others' follow from it) and the digest of the one before."""
        index = len(sequence.block_digests)
        first = index * self.block_size
        numbers = sequence.token_ids[first : first + self.block_size]
        if length := self._frequency_length(max(sequence.num_prompt_tokens, first + 1)):
            numbers = [*numbers, length]
        before = sequence.block_digests[-1] if index else sequence.block_salt
        return blake2b(before + array("q", numbers).tobytes(), digest_size=32).digest()

    def _evict(self) -> int:
        block_id = next(iter(self._idle))
        del self._idle[block_id]
        del self._block_of[self._digest_of.pop(block_id)]
        return block_id
