"""A step's tokens as arrays, and their way to the device. Knows sequences; knows no model.

T: tokens in the step, B: sequences, n: most blocks of any sequence, S: tokens a block.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cluster.engine.step import ScheduledSequence
from cluster.kernels.paged import PagedBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class StepArrays:
    """On the host, all int64. token_ids, positions, lengths, slots: [T].  context_lens: [B], the new tokens included.
    lengths: of each token's sequence when it was new, the whole prompt for the prompt's tokens.
    tables: [B, n], padded with padding_block."""

    query_lens: list[int]
    token_ids: np.ndarray
    positions: np.ndarray
    lengths: np.ndarray
    slots: np.ndarray
    context_lens: np.ndarray
    tables: np.ndarray
    padding_block: int

    @classmethod
    def of(cls, scheduled: Seq[ScheduledSequence], *, block_size: int, padding_block: int) -> "StepArrays":
        """The blocks of the scheduled tokens must be allocated."""
        token_ids, positions, lengths, slots = [], [], [], []
        context_lens = [s.sequence.num_computed_tokens + s.num_tokens for s in scheduled]
        widths = [-(-length // block_size) for length in context_lens]
        tables = np.full((len(scheduled), max(widths)), padding_block, dtype=np.int64)
        for row, (s, stop, width) in enumerate(zip(scheduled, context_lens, widths, strict=True)):
            first = s.sequence.num_computed_tokens
            where = np.arange(first, stop)
            tables[row, :width] = s.sequence.block_table[:width]
            token_ids.append(np.asarray(s.sequence.token_ids[first:stop]))
            positions.append(where)
            lengths.append(np.maximum(where + 1, s.sequence.num_prompt_tokens))
            slots.append(tables[row, where // block_size] * block_size + where % block_size)
        return cls(
            query_lens=[s.num_tokens for s in scheduled],
            token_ids=np.concatenate(token_ids),
            positions=np.concatenate(positions),
            lengths=np.concatenate(lengths),
            slots=np.concatenate(slots),
            context_lens=np.asarray(context_lens),
            tables=tables,
            padding_block=padding_block,
        )

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, PagedBatch]:
        """Token ids, positions and lengths, each [T], and the places, on the device."""
        token_ids, positions, lengths, slots, context_lens, tables = to_device(
            (self.token_ids, self.positions, self.lengths, self.slots, self.context_lens, self.tables), device
        )
        batch = PagedBatch(
            query_lens=self.query_lens,
            context_lens=self.context_lens.tolist(),
            block_tables=tables,
            slot_mapping=slots,
            context_lens_tensor=context_lens,
            padding_block=self.padding_block,
        )
        return token_ids, positions, lengths, batch


def to_device(arrays: Seq[np.ndarray], device: torch.device) -> list[Tensor]:
    """int64 arrays as tensors there: to a GPU in one copy that nobody waits for."""
    if device.type != "cuda":
        return [torch.from_numpy(array).to(device) for array in arrays]
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays])).pin_memory()
    parts = torch.split(flat.to(device, non_blocking=True), [array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]
