"""Counts the blocks of the KV cache. Knows no tensors."""

from cluster.engine.sequence import Sequence


class BlockManager:
    """Hands out block ids 0 … num_blocks − 1 and takes them back."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        """Makes room for the first `num_tokens` tokens of a sequence; false, and nothing changed, if there is none."""
        missing = self.blocks_for(num_tokens) - len(sequence.block_table)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            sequence.block_table.append(self._free.pop())
        return True

    def free(self, sequence: Sequence) -> None:
        """Takes all blocks of a sequence back."""
        self._free.extend(reversed(sequence.block_table))
        sequence.block_table.clear()
