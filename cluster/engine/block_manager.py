"""Gives sequences the blocks of their tokens in each group of layers, and finds those of a known beginning.

Knows no tensors. Layers of one window are a group with a pool of its own. A sequence has a block in each group for each
block_size tokens; where a window slides, it gives those back that no later token of it can see.
"""

import sys
from array import array
from collections.abc import Callable
from collections.abc import Sequence as Seq
from hashlib import blake2b

from cluster.config import EngineConfig, ModelConfig
from cluster.engine.block_pool import BlockPool
from cluster.engine.block_table import BlockTable
from cluster.engine.sequence import Sequence
from cluster.model.cache_size import most_blocks


class BlockManager:
    """Used by one thread.

    max_step_tokens: new tokens of one sequence in a step at most; where a window slides, its blocks are held beside
    the window's.
    frequency_length: as of `RopeConfig`, 0 where keys do not depend on their sequence's length.

    A full block is known by a digest of its sequence's salt, of all tokens up to its end, and of the lengths that their
    keys depend on.
    """

    def __init__(
        self,
        pools: Seq[BlockPool],
        block_size: int,
        *,
        max_step_tokens: int,
        prefix_caching: bool = False,
        frequency_length: Callable[[int], int] = lambda _: 0,
    ) -> None:
        self.pools = tuple(pools)
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._max_step_tokens = max_step_tokens
        self._frequency_length = frequency_length

    @property
    def num_blocks(self) -> int:
        """Of the largest pool."""
        return max(pool.num_blocks for pool in self.pools)

    @property
    def num_used(self) -> int:
        """Of num_blocks, the share that is used of the fullest pool."""
        shares = (-(-pool.num_used * self.num_blocks // pool.num_blocks) for pool in self.pools)
        return max(shares)

    @property
    def max_tokens(self) -> int:
        """The longest sequence that fits the pools alone."""
        return min(self._most_tokens(pool) for pool in self.pools)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        """Gives a sequence blocks for its first `num_tokens` tokens; without room changes nothing and returns False."""
        tables, wanted = self._tables(sequence), self.blocks_for(num_tokens)
        pairs = tuple(zip(self.pools, tables, strict=True))
        if any(wanted - len(table) > pool.num_free for pool, table in pairs):
            return False
        for pool, table in pairs:
            while len(table) < wanted:
                table.append(pool.take())
        return True

    def have_room_for(self, new: Seq[Sequence], running: Seq[Sequence]) -> bool:
        """Whether all known tokens of new and of running sequences would fit at once."""
        for group, pool in enumerate(self.pools):
            needed = sum(self._needed(pool, len(sequence.token_ids)) for sequence in new)
            for sequence in running:
                held = self._tables(sequence)[group].num_held
                needed += max(0, self._needed(pool, len(sequence.token_ids)) - held)
            if needed > pool.num_free:
                return False
        return True

    def reuse(self, sequence: Sequence) -> int:
        """Gives a sequence without blocks those that hold its beginning, all but its last token at most: in every group
        all that its next token sees.

        Sets its num_computed_tokens; returns it. One whose result needs all its rows gets none.
        """
        tables = self._tables(sequence)
        assert not any(len(table) for table in tables)
        num_blocks = 0
        if self.prefix_caching and not sequence.wants_every_row:
            num_blocks = self._num_known(sequence)
        for pool, table in zip(self.pools, tables, strict=True):
            table.skip(self._num_unseen(pool, num_blocks * self.block_size))
            for digest in sequence.block_digests[len(table) : num_blocks]:
                block_id = pool.find(digest)
                assert block_id is not None
                pool.hold(block_id)
                table.append(block_id)
        sequence.num_reused_blocks = sequence.num_remembered_blocks = num_blocks
        sequence.num_computed_tokens = num_blocks * self.block_size
        return sequence.num_computed_tokens

    def remember(self, sequence: Sequence) -> None:
        """Makes a sequence's full, computed blocks findable, one digest a block, and takes those back that it sees no
        more. Call it after each step.

        A sequence that NaN does not end shares none: no other may read blocks with NaN.
        """
        tables = self._tables(sequence)
        if self.prefix_caching and not sequence.keeps_non_finite:
            for index in range(sequence.num_remembered_blocks, sequence.num_computed_tokens // self.block_size):
                digest = self._digest(sequence, index)
                for pool, table in zip(self.pools, tables, strict=True):
                    pool.remember(table.id_of(index), digest)
                sequence.num_remembered_blocks = index + 1
        for pool, table in zip(self.pools, tables, strict=True):
            num_unseen = min(self._num_unseen(pool, sequence.num_computed_tokens), len(table))
            while table.num_dropped < num_unseen:
                pool.let_go(table.drop())

    def disown(self, sequence: Sequence) -> None:
        """Makes the blocks that a sequence has computed unfindable, those too that it has given back; those that it
        found stay findable."""
        for index in range(sequence.num_reused_blocks, sequence.num_remembered_blocks):
            for pool, table in zip(self.pools, self._tables(sequence), strict=True):
                pool.disown(table.id_of(index), sequence.block_digests[index])

    def free(self, sequence: Sequence) -> None:
        """Takes all blocks of a sequence back, its last first: beginnings are shared more often than ends."""
        for pool, table in zip(self.pools, self._tables(sequence), strict=True):
            for block_id in reversed(table.held().tolist()):
                pool.let_go(block_id)
            table.clear()
        sequence.num_reused_blocks = sequence.num_remembered_blocks = 0

    def _tables(self, sequence: Sequence) -> list[BlockTable]:
        """The sequence's tables, made with its first blocks."""
        if not sequence.block_tables:
            sequence.block_tables.extend(BlockTable() for _ in self.pools)
        return sequence.block_tables

    def _num_known(self, sequence: Sequence) -> int:
        """The most blocks of its beginning that all groups have, as far as its next token sees them."""
        known, runs = 0, [0] * len(self.pools)  # runs: found blocks one after another, up to this one
        for index in range((len(sequence.token_ids) - 1) // self.block_size):
            digest = self._digest(sequence, index)
            for group, pool in enumerate(self.pools):
                runs[group] = runs[group] + 1 if pool.find(digest) is not None else 0
                if pool.window is None and not runs[group]:
                    return known
            stop = (index + 1) * self.block_size
            if all(run >= index + 1 - self._num_unseen(pool, stop) for run, pool in zip(runs, self.pools, strict=True)):
                known = index + 1
        return known

    def _num_unseen(self, pool: BlockPool, num_computed_tokens: int) -> int:
        """The first blocks of a sequence that no token from its next one on sees."""
        return 0 if pool.window is None else max(0, num_computed_tokens + 1 - pool.window) // self.block_size

    def _needed(self, pool: BlockPool, num_tokens: int) -> int:
        return most_blocks(pool.window, num_tokens, self._max_step_tokens, self.block_size)

    def _most_tokens(self, pool: BlockPool) -> int:
        """Of the longest sequence that fits a pool alone."""
        if pool.window is not None and pool.num_blocks >= self._needed(pool, sys.maxsize):
            return sys.maxsize
        return pool.num_blocks * self.block_size

    def _digest(self, sequence: Sequence, index: int) -> bytes:
        """Of a block whose predecessors have theirs: over its tokens, the length of the sequence for the first of them
        (the others' follow from it) and the digest of the one before. It is kept: tokens do not change."""
        digests = sequence.block_digests
        if index == len(digests):
            first = index * self.block_size
            numbers = sequence.token_ids[first : first + self.block_size]
            if length := self._frequency_length(max(sequence.num_prompt_tokens, first + 1)):
                numbers = [*numbers, length]
            before = digests[-1] if index else sequence.block_salt
            digests.append(blake2b(before + array("q", numbers).tobytes(), digest_size=32).digest())
        return digests[index]


def make_block_manager(model: ModelConfig, config: EngineConfig, num_blocks: Seq[int]) -> BlockManager:
    """num_blocks: of each group of layers."""
    return BlockManager(
        [BlockPool(count, group.window) for count, group in zip(num_blocks, model.layer_groups, strict=True)],
        config.block_size,
        max_step_tokens=config.max_num_batched_tokens,
        prefix_caching=config.enable_prefix_caching,
        frequency_length=model.rope.frequency_length,
    )
