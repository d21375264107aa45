"""Turns a batch into tensors, the model's step into tokens. Knows no queue and no clock.

A drafted token is right where the one that is chosen in its place, as without a draft, is the same. So a sequence gets
the tokens that it would get one at a time, with the same log-probabilities.
T: rows of the step, B: those that choose a token, V: vocabulary.
"""

import time
from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from cluster.config.resources import available_cpus
from cluster.engine.graphs import DecodeGraphs
from cluster.engine.leader import Leads
from cluster.engine.micro_batching import MicroBatching, split_evenly
from cluster.engine.outcomes import parts_of
from cluster.engine.sequence import Sequence
from cluster.engine.step import Batch, ScheduledSequence, StepResult
from cluster.engine.step_inputs import StepArrays, micro_batch, to_device
from cluster.experts.adapted_ids import NO_ADAPTER
from cluster.experts.dispatch import ExpertDispatcher
from cluster.experts.step import EverySequenceLost, StepExperts
from cluster.grammar.masks import MaskThreads, RowMasks
from cluster.kernels.attention import make_attention
from cluster.kernels.sampling.rule import Mask, leaves_any
from cluster.model.adapters import Adapter, head_adapters, step_adapters
from cluster.model.decoder import CausalLM
from cluster.model.kv_cache import KVCache
from cluster.model.layers.feed_forward import Experts
from cluster.model.sampler import NoFiniteNumbers, Sampled, SamplingRow, sample

MASK_THREADS = 4  # a mask takes 20 to 100 us; a step for 64 rows has time for them with one


class ModelRunner:
    """The `Runner` of a model, with its cache and its experts.

    micro_batching: chooses into how many parts a step is split; None for never.
    graphs: replay the steps that they take, if there are any.  leader: tells each step to the model's other ranks.
    """

    def __init__(
        self,
        model: CausalLM,
        cache: KVCache,
        experts: ExpertDispatcher,
        block_size: int,
        micro_batching: MicroBatching | None = None,
    ) -> None:
        self.model = model
        self.cache = cache
        self.experts = experts
        self.block_size = block_size
        self.micro_batching = micro_batching or MicroBatching(enabled=False)
        self.attention = make_attention(cache.layer(0)[0], model.config.num_attention_heads)
        self.device = model.model.norm.weight.device
        self.graphs: DecodeGraphs | None = None
        self.leader: Leads | None = None
        self.masks = MaskThreads(min(MASK_THREADS, available_cpus()))

    @property
    def num_ahead(self) -> int:
        return 0  # a step samples one token for a sequence

    @property
    def recovery_timeout_s(self) -> float:
        return self.experts.recovery_timeout_s

    def has_news(self, epoch: int) -> bool:
        return self.experts.plans.wait_beyond(epoch, 0.0)

    def wait_for_news(self, epoch: int, timeout_s: float) -> None:
        self.experts.plans.wait_beyond(epoch, timeout_s)

    def logits(self, hidden_states: Tensor, adapter: Adapter | None = None) -> Tensor:
        adapters = head_adapters([adapter], [len(hidden_states)], self.device)
        return self.model.logits(hidden_states.to(self.device, self.model.model.norm.weight.dtype), adapters)

    def check_device(self) -> None:
        if self.leader is not None:
            self.leader.check()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def run(self, batch: Batch) -> StepResult:
        """As `Runner.run`, a token for a sequence and one more for each of its draft that is right."""
        grammars = {i: s.sequence.grammar for i, s in enumerate(batch.scheduled) if s.samples and s.sequence.grammar}
        with self.masks.beside(grammars) as masks:
            hidden_states, step = self.forward(batch.scheduled)  # [T, H]
            tokens, failed = self._sample(batch.scheduled, hidden_states, step, masks)
        parts: dict[int, Tensor] = {}
        if len(step.lost) < len(batch.scheduled):
            failed |= self._non_finite(batch, hidden_states, step, tokens)
            chosen = [i for i, s in enumerate(batch.scheduled) if not s.sequence.wants_tokens]
            chosen = [i for i in chosen if i not in step.lost and i not in failed]
            if chosen:
                parts, more = parts_of(self.model, batch.scheduled, hidden_states, chosen)
                failed |= more
        if failed:
            self.check_device()
        every = [tokens[i] if i in tokens and i not in failed else () for i in range(len(batch.scheduled))]
        return StepResult(every, parts, step.lost, step.epoch, failed)

    def _non_finite(
        self, batch: Batch, hidden_states: Tensor, step: StepExperts, tokens: dict[int, list[Sampled]]
    ) -> dict[int, Exception]:
        """The sequences that have failed. Where a row of a draft is not finite, the tokens from there on are taken
        back: the next step tells whether they belong to the sequence."""
        sizes: list[int] = []
        places: list[tuple[int, int]] = []  # of each group of rows: its sequence, and how many of the draft it follows
        for i, s in enumerate(batch.scheduled):
            sizes += [s.num_tokens, *[1] * len(s.draft)]
            places += [(i, j) for j in range(1 + len(s.draft))]
        failed: dict[int, Exception] = {}
        for i, j in (places[group] for group in non_finite(hidden_states, sizes)):
            if i in step.lost or batch.scheduled[i].sequence.keeps_non_finite:
                continue
            if j:
                tokens[i] = tokens.get(i, [])[:j]
            else:
                failed[i] = NoFiniteNumbers("a row's hidden state is NaN or infinite")
        return failed

    def _sample(
        self, scheduled: Seq[ScheduledSequence], hidden_states: Tensor, step: StepExperts, masks: RowMasks
    ) -> tuple[dict[int, list[Sampled]], dict[int, Exception]]:
        """The next tokens of each sequence that samples and is not lost, or its exception. hidden_states: [T, H]."""
        tokens: dict[int, list[Sampled]] = {}
        failed: dict[int, Exception] = {}
        rows: dict[int, list[SamplingRow]] = {}
        for i, s in enumerate(scheduled):
            if s.samples and i not in step.lost:
                try:
                    rows[i] = _sampling_rows(s, masks.of(i))
                except Exception as error:  # noqa: BLE001 it is this sequence's alone
                    failed[i] = error
        if rows:
            stops = np.cumsum([s.num_rows for s in scheduled])
            places = np.concatenate([np.arange(stops[i] - len(of_one), stops[i]) for i, of_one in rows.items()])
            adapters = head_adapters(
                [scheduled[i].sequence.adapter for i in rows], list(map(len, rows.values())), self.device
            )
            logits = self.model.logits(hidden_states[to_device([places], self.device)[0]], adapters)  # [B, V]
            chosen = iter(sample(logits, [row for of_one in rows.values() for row in of_one]))
            for i, of_one in rows.items():
                tokens[i], met = right_tokens(scheduled[i].draft, [next(chosen) for _ in of_one])
                if met is not None:
                    failed[i] = met
        return tokens, failed

    def forward(self, scheduled: Seq[ScheduledSequence]) -> tuple[Tensor, StepExperts]:
        """Hidden states [T, H] of the scheduled tokens, whose blocks must be allocated, and which sequences are lost:
        theirs are without meaning, and [0, H] when all are. Raises ClusterError."""
        step = StepExperts(self.experts, len(scheduled))
        try:
            if self.graphs is not None and self.graphs.take(scheduled):  # none of an adapter
                hidden_states = self.graphs.run(self._arrays(scheduled), self._part(step, 0, scheduled))
                if hidden_states is not None:
                    return hidden_states, step
            return self._forward_in_parts(scheduled, step), step
        except EverySequenceLost:
            step.abandon()
            return torch.empty(0, self.model.config.hidden_size, device=self.device), step
        except BaseException:
            step.abandon()
            raise
        finally:
            self.experts.account()
            if self.leader is not None:
                self.leader.settle()

    def _forward_in_parts(self, scheduled: Seq[ScheduledSequence], step: StepExperts) -> Tensor:
        num_tokens = sum(s.num_rows for s in scheduled)
        num_parts = self.micro_batching.choose(num_tokens, len(scheduled))
        started = time.monotonic()
        parts, first = [], 0
        split = split_evenly(scheduled, num_parts)
        arrays = [self._arrays(part) for part in split]
        tails = [self._clear(part) for part in split]
        adapters = [
            step_adapters([s.sequence.adapter for s in part], of_part.query_lens, self.device)
            for part, of_part in zip(split, arrays, strict=True)
        ]
        if self.leader is not None:
            self.leader.begin(arrays, tails, adapters)
        for part, of_part, changes in zip(split, arrays, adapters, strict=True):
            experts = self._part(step, first, part)
            parts.append(micro_batch(of_part, self.attention, self.device, experts, changes))
            first += len(part)
        hidden_states: Tensor = self.model(parts, self.cache)
        if not step.lost:
            self.micro_batching.record(num_tokens, len(scheduled), num_parts, time.monotonic() - started)
        return hidden_states

    def _part(self, step: StepExperts, first: int, scheduled: Seq[ScheduledSequence]) -> Experts:
        adapters = [s.sequence.adapter for s in scheduled]
        numbers = None
        if any(adapter is not None and adapter.has_experts for adapter in adapters):
            numbers = [a.source.number if a is not None and a.has_experts else NO_ADAPTER for a in adapters]
        return step.part(first, [s.num_rows for s in scheduled], self.device, numbers)

    def _clear(self, scheduled: Seq[ScheduledSequence]) -> list[np.ndarray]:
        """Writes zeros where attention may read past a sequence's end. Returns the slots, of each group of layers."""
        groups = self.cache.groups
        if not self.attention.reads_whole_blocks:
            return [np.empty(0, dtype=np.int64) for _ in groups]
        tails = [self._tails(scheduled, number) for number in range(len(groups))]
        for group, slots in zip(groups, tails, strict=True):
            group.clear(slots)
        return tails

    def _arrays(self, scheduled: Seq[ScheduledSequence]) -> StepArrays:
        padding_blocks = [group.padding_block for group in self.cache.groups]
        return StepArrays.of(scheduled, block_size=self.block_size, padding_blocks=padding_blocks)

    def _tails(self, scheduled: Seq[ScheduledSequence], group: int) -> np.ndarray:
        """The slots behind the tokens of sequences that begin a block, to that block's end, and of those that may have
        had a draft before: what was wrong of it stands there."""
        tails = [np.empty(0, dtype=np.int64)]
        for s in scheduled:
            first, stop = s.sequence.num_computed_tokens, s.sequence.num_computed_tokens + s.num_rows
            if s.num_rows > 1 or first % self.block_size == 0 or s.sequence.drafting.num_drafted:
                last = s.sequence.block_tables[group].id_of((stop - 1) // self.block_size)
                tails.append(np.arange((stop - 1) % self.block_size + 1, self.block_size) + last * self.block_size)
        return np.concatenate(tails)


def non_finite(hidden_states: Tensor, num_tokens: Seq[int]) -> list[int]:
    """The numbers of the sequences with NaN or infinity in one of their rows. hidden_states: [T, H], num_tokens each.

    A key or value that is NaN makes its row NaN in every layer after it, so all rows are looked at.
    """
    sums = hidden_states.sum(dim=-1, dtype=torch.float32)  # [T]; finite halves add up to a finite float
    if len(num_tokens) < len(sums):
        [owners] = to_device([np.repeat(np.arange(len(num_tokens)), num_tokens)], sums.device)
        sums = sums.new_zeros(len(num_tokens)).index_add_(0, owners, sums)
    return [i for i, finite in enumerate(sums.isfinite().tolist()) if not finite]


def right_tokens(draft: Seq[int], chosen: Seq[Sampled | Exception]) -> tuple[list[Sampled], Exception | None]:
    """Of the tokens chosen after 0, 1, … of a draft, those before which the draft is right. An exception at the first
    is the sequence's; at a later one its next step meets it, if it comes there."""
    tokens: list[Sampled] = []
    for place, token in enumerate(chosen):
        if isinstance(token, Exception):
            return tokens, None if tokens else token
        tokens.append(token)
        if place < len(draft) and token[0] != draft[place]:
            break
    return tokens, None


def _sampling_rows(scheduled: ScheduledSequence, allowed: Mask | None) -> list[SamplingRow]:
    """Of a sequence's last token, and of each of its draft, which a sequence with a grammar has none of."""
    draft = scheduled.draft
    return [_sampling_row(scheduled.sequence, draft[:num], allowed) for num in range(1 + len(draft))]


def _sampling_row(sequence: Sequence, ahead: tuple[int, ...], allowed: Mask | None) -> SamplingRow:
    below_minimum = sequence.num_output_tokens + len(ahead) < sequence.params.min_tokens
    if below_minimum and allowed is not None:
        below_minimum = leaves_any(allowed, sequence.stop_token_ids)  # else the grammar has come to its end
    return SamplingRow(
        token_ids=sequence.token_ids,
        num_prompt_tokens=sequence.num_prompt_tokens,
        params=sequence.params,
        penalties=sequence.penalties,
        ahead=ahead,
        banned_token_ids=tuple(sequence.stop_token_ids) if below_minimum else (),
        allowed=allowed,
    )
