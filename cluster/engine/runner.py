"""Turns a batch into tensors, the model's step into tokens. Knows no queue and no clock.

T: tokens in the step, B: sequences, V: vocabulary.
"""

import time
from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from cluster.engine.micro_batching import MicroBatching, split_evenly
from cluster.engine.scheduler import Batch, ScheduledSequence
from cluster.engine.sequence import Sequence
from cluster.kernels.attention import PagedBatch
from cluster.model.kv_cache import KVCache
from cluster.model.moe import Experts
from cluster.model.qwen2_moe import MicroBatch, Qwen2Moe
from cluster.model.sampler import SamplingRow, sample
from cluster.types import Logprobs


class ModelRunner:
    """The model, its cache and its experts. Used by one thread.

    micro_batching: chooses into how many parts a step is split; None for never.
    """

    def __init__(
        self,
        model: Qwen2Moe,
        cache: KVCache,
        experts: Experts,
        block_size: int,
        micro_batching: MicroBatching | None = None,
    ) -> None:
        self.model = model
        self.cache = cache
        self.experts = experts
        self.block_size = block_size
        self.micro_batching = micro_batching or MicroBatching(enabled=False)
        self.device = model.model.norm.weight.device

    def run(self, batch: Batch) -> list[tuple[int, Logprobs | None] | None]:
        """Computes a step and returns each sequence's new token, None where a prompt is not through yet.

        Blocks. Raises ShardUnavailable; the step may then be run again.
        """
        hidden_states = self.forward(batch.scheduled)  # [T, H]
        ends = np.cumsum([s.num_tokens for s in batch.scheduled]) - 1
        sampling = [i for i, s in enumerate(batch.scheduled) if s.samples]
        if not sampling:
            return [None] * len(batch.scheduled)
        last = torch.from_numpy(ends[sampling]).to(self.device)
        logits = self.model.logits(hidden_states[last])  # [B, V]
        sampled = iter(sample(logits, [_sampling_row(batch.scheduled[i].sequence) for i in sampling]))
        return [next(sampled) if s.samples else None for s in batch.scheduled]

    def forward(self, scheduled: Seq[ScheduledSequence]) -> Tensor:
        """Hidden states [T, H] of the scheduled tokens, whose blocks must be allocated."""
        num_tokens = sum(s.num_tokens for s in scheduled)
        num_parts = self.micro_batching.choose(num_tokens, len(scheduled))
        started = time.monotonic()
        parts = [self._micro_batch(part) for part in split_evenly(scheduled, num_parts)]
        hidden_states: Tensor = self.model(parts, self.cache, self.experts)
        self.micro_batching.record(num_tokens, len(scheduled), num_parts, time.monotonic() - started)
        return hidden_states

    def _micro_batch(self, scheduled: Seq[ScheduledSequence]) -> MicroBatch:
        token_ids, positions, slots = [], [], []
        for s in scheduled:
            first, stop = s.sequence.num_computed_tokens, s.sequence.num_computed_tokens + s.num_tokens
            where = np.arange(first, stop)
            table = np.asarray(s.sequence.block_table)
            token_ids.append(np.asarray(s.sequence.token_ids[first:stop]))
            positions.append(where)
            slots.append(table[where // self.block_size] * self.block_size + where % self.block_size)
        return MicroBatch(
            token_ids=self._tensor(np.concatenate(token_ids)),
            positions=self._tensor(np.concatenate(positions)),
            paged=self._paged_batch(scheduled, np.concatenate(slots)),
        )

    def _paged_batch(self, scheduled: Seq[ScheduledSequence], slots: np.ndarray) -> PagedBatch:
        context_lens = [s.sequence.num_computed_tokens + s.num_tokens for s in scheduled]
        widths = [-(-length // self.block_size) for length in context_lens]
        block_tables = np.zeros((len(scheduled), max(widths)), dtype=np.int64)
        for row, (s, width) in enumerate(zip(scheduled, widths, strict=True)):
            block_tables[row, :width] = s.sequence.block_table[:width]
        return PagedBatch(
            query_lens=[s.num_tokens for s in scheduled],
            context_lens=context_lens,
            block_tables=self._tensor(block_tables),
            slot_mapping=self._tensor(slots),
            context_lens_tensor=self._tensor(np.asarray(context_lens)),
        )

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def _sampling_row(sequence: Sequence) -> SamplingRow:
    below_minimum = sequence.num_output_tokens < sequence.params.min_tokens
    return SamplingRow(
        token_ids=sequence.token_ids,
        num_prompt_tokens=sequence.num_prompt_tokens,
        params=sequence.params,
        penalties=sequence.penalties,
        banned_token_ids=tuple(sequence.stop_token_ids) if below_minimum else (),
    )
