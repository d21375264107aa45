"""A step's tokens as arrays, and their way to the device. Knows sequences; of the model, what it takes.

T: tokens in the step, B: sequences, n: most blocks of any sequence, S: tokens a block.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cluster.engine.step import ScheduledSequence
from cluster.kernels.paged import AttentionKernel, PagedBatch
from cluster.model.decoder import Adapters, MicroBatch
from cluster.model.layers.feed_forward import Experts


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where a step's tokens are in one group of layers, on the host, all int64. slots: [T].  tables: [B, n], the
    padding_block where a sequence holds no block: past its end, and where it has given one back."""

    slots: np.ndarray
    tables: np.ndarray
    padding_block: int

    @classmethod
    def of(cls, scheduled: Seq[ScheduledSequence], group: int, *, block_size: int, padding_block: int) -> "Places":
        """The blocks of the scheduled tokens must be allocated."""
        slots = []
        stops = [s.sequence.num_computed_tokens + s.num_rows for s in scheduled]
        widths = [-(-stop // block_size) for stop in stops]
        tables = np.full((len(scheduled), max(widths)), padding_block, dtype=np.int64)
        for row, (s, stop, width) in enumerate(zip(scheduled, stops, widths, strict=True)):
            table = s.sequence.block_tables[group]
            tables[row, table.num_dropped : width] = table.held(width)
            where = np.arange(s.sequence.num_computed_tokens, stop)
            slots.append(tables[row, where // block_size] * block_size + where % block_size)
        return cls(slots=np.concatenate(slots), tables=tables, padding_block=padding_block)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepArrays:
    """On the host, all int64. token_ids, positions, lengths: [T].  context_lens: [B], the new tokens included.
    lengths: of each token's sequence when it was new, the whole prompt for the prompt's tokens.
    places: of each group of layers."""

    query_lens: list[int]
    token_ids: np.ndarray
    positions: np.ndarray
    lengths: np.ndarray
    context_lens: np.ndarray
    places: tuple[Places, ...]

    @classmethod
    def of(cls, scheduled: Seq[ScheduledSequence], *, block_size: int, padding_blocks: Seq[int]) -> "StepArrays":
        """padding_blocks: of each group. The blocks of the scheduled tokens must be allocated."""
        token_ids, positions, lengths = [], [], []
        context_lens = [s.sequence.num_computed_tokens + s.num_rows for s in scheduled]
        for s, stop in zip(scheduled, context_lens, strict=True):
            where = np.arange(s.sequence.num_computed_tokens, stop)
            token_ids.append(np.asarray(s.row_token_ids))
            positions.append(where)
            lengths.append(np.maximum(where + 1, s.sequence.num_prompt_tokens))
        return cls(
            query_lens=[s.num_rows for s in scheduled],
            token_ids=np.concatenate(token_ids),
            positions=np.concatenate(positions),
            lengths=np.concatenate(lengths),
            context_lens=np.asarray(context_lens),
            places=tuple(
                Places.of(scheduled, group, block_size=block_size, padding_block=padding_block)
                for group, padding_block in enumerate(padding_blocks)
            ),
        )

    def arrays(self) -> list[np.ndarray]:
        """All of them, for another process."""
        of_groups = [array for places in self.places for array in (places.slots, places.tables)]
        lens = np.asarray(self.query_lens, dtype=np.int64)
        return [lens, self.token_ids, self.positions, self.lengths, self.context_lens, *of_groups]

    @classmethod
    def of_arrays(cls, arrays: Seq[np.ndarray], padding_blocks: Seq[int]) -> "StepArrays":
        """From what `arrays` gave. padding_blocks: of each group here."""
        lens, token_ids, positions, lengths, context_lens, *of_groups = arrays
        return cls(
            query_lens=lens.tolist(),
            token_ids=token_ids,
            positions=positions,
            lengths=lengths,
            context_lens=context_lens,
            places=tuple(
                Places(slots=slots, tables=tables, padding_block=padding_block)
                for slots, tables, padding_block in zip(of_groups[::2], of_groups[1::2], padding_blocks, strict=True)
            ),
        )

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, list[PagedBatch]]:
        """Token ids, positions and lengths, each [T], and the places in each group, on the device."""
        arrays = [self.token_ids, self.positions, self.lengths, self.context_lens]
        for places in self.places:
            arrays += [places.slots, places.tables]
        token_ids, positions, lengths, context_lens, *of_groups = to_device(arrays, device)
        batches = [
            PagedBatch(
                query_lens=self.query_lens,
                context_lens=self.context_lens.tolist(),
                block_tables=tables,
                slot_mapping=slots,
                context_lens_tensor=context_lens,
                padding_block=places.padding_block,
            )
            for places, slots, tables in zip(self.places, of_groups[::2], of_groups[1::2], strict=True)
        ]
        return token_ids, positions, lengths, batches


def micro_batch(
    arrays: StepArrays,
    attention: AttentionKernel,
    device: torch.device,
    experts: Experts | None,
    adapters: Adapters | None = None,
) -> MicroBatch:
    """As the model takes it."""
    token_ids, positions, lengths, batches = arrays.on(device)
    return MicroBatch(
        token_ids=token_ids,
        positions=positions,
        lengths=lengths,
        attention=[attention.plan(batch) for batch in batches],
        experts=experts,
        adapters=adapters,
    )


def to_device(arrays: Seq[np.ndarray], device: torch.device) -> list[Tensor]:
    """int64 arrays as tensors there: to a GPU in one copy that nobody waits for."""
    if device.type != "cuda":
        return [torch.from_numpy(array).to(device) for array in arrays]
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays])).pin_memory()
    parts = torch.split(flat.to(device, non_blocking=True), [array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]
