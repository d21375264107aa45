"""Decode steps of a GPU as CUDA graphs: captured once for each size, then replayed with one launch for many.

A step is captured from the model as it is. Where its experts are elsewhere, the graph is cut at each crossing: a piece
up to the rows that leave, one up to those that are waited for. Knows no sequence and no transport.
B: sequences of a step, P: of a captured one (padded), H: hidden size, S: tokens a block.
"""

import logging
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.engine.step import ScheduledSequence
from cluster.engine.step_inputs import StepArrays, to_device
from cluster.experts.transport import NOT_HERE
from cluster.kernels.paged import AttentionKernel, PlansDecode
from cluster.model.decoder import CausalLM, MicroBatch
from cluster.model.kv_cache import KVCache
from cluster.model.layers.feed_forward import Experts

log = logging.getLogger(__name__)

FEWEST_KEYS = 256  # of a captured step; for longer contexts there are others, each for twice as many
SIZES = (1, 2, 4, *range(8, 64, 8), *range(64, 257, 32), *range(320, 4097, 64))


@dataclass(frozen=True, slots=True)
class _Departure:
    """Rows that leave: a layer's hidden states [P, H], ids and weights [P, K], at fixed addresses."""

    layer_id: int
    hidden_states: Tensor
    topk_ids: Tensor
    topk_weights: Tensor


@dataclass(frozen=True, slots=True)
class _Arrival:
    """Where a layer's sums are to be written: [P, H]."""

    layer_id: int
    sums: Tensor


class _Cuts:
    """The `Experts` of a step that is captured with its experts elsewhere: ends a piece at each crossing."""

    def __init__(self, cut: Callable[[Callable[[], _Departure | _Arrival]], _Departure | _Arrival]) -> None:
        self._cut = cut

    def dispatch(self, layer_id: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Any:
        self._cut(lambda: _Departure(layer_id, hidden_states, topk_ids, topk_weights))
        return layer_id, hidden_states

    def combine(self, flight: Any) -> Tensor:
        layer_id, like = flight
        arrival = self._cut(lambda: _Arrival(layer_id, torch.zeros_like(like)))
        assert isinstance(arrival, _Arrival)
        return arrival.sums


class _Inline:
    """The `Experts` of a step that is captured with them. Padded rows ask for no expert."""

    def __init__(self, experts: Experts, slots: Tensor, padding_slot: int) -> None:
        self._experts = experts
        self._slots = slots
        self._padding_slot = padding_slot

    def dispatch(self, layer_id: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Any:
        is_padding = (self._slots == self._padding_slot).unsqueeze(1)
        return self._experts.dispatch(layer_id, hidden_states, topk_ids.masked_fill(is_padding, NOT_HERE), topk_weights)

    def combine(self, flight: Any) -> Tensor:
        return self._experts.combine(flight)


@dataclass(slots=True)
class _Captured:
    """inputs: [P (4 + G (1 + n))] int64, of G groups of layers.  pieces: each graph and the crossing behind it.
    hidden_states: [P, H], the result."""

    inputs: Tensor
    width: int
    pieces: list[tuple[torch.cuda.CUDAGraph, _Departure | _Arrival | None]] = field(default_factory=list)
    hidden_states: Tensor | None = None


class DecodeGraphs:
    """Used by one thread.

    experts: computed inside the graph; None where each step brings its own, which may be elsewhere. The metrics of
    such experts count nothing, since a replay runs no Python between its kernels.
    """

    def __init__(
        self,
        model: CausalLM,
        cache: KVCache,
        attention: PlansDecode,
        *,
        experts: Experts | None,
        max_sequences: int,
    ) -> None:
        self._model, self._cache, self._attention, self._experts = model, cache, attention, experts
        self._block_size = cache.block_size
        self._sizes = [size for size in SIZES if size < max_sequences] + [max_sequences]
        self._device = cache.device
        self._stream: torch.cuda.Stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._captured: dict[tuple[int, int], _Captured] = {}
        self._refused: set[tuple[int, int]] = set()

    def take(self, scheduled: Seq[ScheduledSequence]) -> bool:
        """Whether the step is one of these: each sequence brings one token, and is computed by the base alone."""
        return len(scheduled) <= self._sizes[-1] and all(
            s.num_rows == 1 and s.sequence.adapter is None for s in scheduled
        )

    @torch.inference_mode()
    def run(self, arrays: StepArrays, experts: Experts) -> Tensor | None:
        """As `CausalLM.forward`: [B, H], valid until the next step. None, and nothing is done, for a size that cannot
        be captured: too little memory. Raises what the experts raise."""
        num_rows = len(arrays.query_lens)
        size = next(size for size in self._sizes if size >= num_rows)
        longest = max(FEWEST_KEYS, self._block_size)
        while longest < int(arrays.context_lens.max()):
            longest *= 2
        key = size, longest
        if key in self._refused:
            return None
        if key not in self._captured:
            try:
                self._captured[key] = self._capture(size, longest)
            except RuntimeError as error:  # of torch: memory, or a kernel that cannot be captured
                log.warning("steps of %d sequences are not captured as CUDA graphs: %s", size, error)
                self._refused.add(key)
                return None
        captured = self._captured[key]
        host = torch.from_numpy(self._inputs(arrays, size, captured.width)).pin_memory()
        captured.inputs.copy_(host, non_blocking=True)
        flights: dict[int, Any] = {}
        for graph, crossing in captured.pieces:
            graph.replay()
            if isinstance(crossing, _Departure):
                rows = (x[:num_rows] for x in (crossing.hidden_states, crossing.topk_ids, crossing.topk_weights))
                flights[crossing.layer_id] = experts.dispatch(crossing.layer_id, *rows)
            elif crossing is not None:
                crossing.sums[:num_rows].copy_(experts.combine(flights.pop(crossing.layer_id)))
        assert captured.hidden_states is not None
        return captured.hidden_states[:num_rows]

    def _inputs(self, arrays: StepArrays | None, size: int, width: int) -> np.ndarray:
        """Token ids, positions, lengths and context lengths, then each group's slots and tables, one after another.
        Padded rows write to the padding block, which no other row reads."""
        groups = self._cache.groups
        flat = np.zeros(size * (4 + len(groups) * (1 + width)), dtype=np.int64)
        rows = flat[: 4 * size].reshape(4, size)
        rows[2:] = 1
        if arrays is not None:
            rows[:, : len(arrays.query_lens)] = (
                arrays.token_ids, arrays.positions, arrays.lengths, arrays.context_lens
            )  # fmt: skip
        for number, part in enumerate(np.split(flat[4 * size :], len(groups))):
            slots, tables = part[:size], part[size:].reshape(size, width)
            tables[:] = groups[number].padding_block
            slots[:] = groups[number].padding_block * self._block_size
            if arrays is not None:
                places = arrays.places[number]
                slots[: len(places.slots)] = places.slots
                tables[: places.tables.shape[0], : places.tables.shape[1]] = places.tables
        return flat

    def _capture(self, size: int, longest: int) -> _Captured:
        """Runs the step once as it is, so that all kernels are there, and once to record it."""
        width = -(-longest // self._block_size)
        [inputs] = to_device([self._inputs(None, size, width)], self._device)
        captured = _Captured(inputs, width)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._forward(captured, size, longest, lambda make: make())
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()  # a capture cannot take what other streams keep
            graph = self._begin()

            def cut(make: Callable[[], _Departure | _Arrival]) -> _Departure | _Arrival:
                nonlocal graph
                graph.capture_end()
                crossing = make()
                captured.pieces.append((graph, crossing))
                graph = self._begin()
                return crossing

            try:
                captured.hidden_states = self._forward(captured, size, longest, cut)
            finally:
                graph.capture_end()
            captured.pieces.append((graph, None))
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return captured

    def _begin(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        return graph

    def _forward(self, captured: _Captured, size: int, longest: int, cut: Any) -> Tensor:
        token_ids, positions, lengths, context_lens = captured.inputs[: 4 * size].view(4, size).unbind()
        groups = captured.inputs[4 * size :].view(len(self._cache.groups), -1)
        plans = [
            self._attention.plan_decode(part[:size], context_lens, part[size:].view(size, captured.width), longest)
            for part in groups
        ]
        padding_slot = self._cache.groups[0].padding_block * self._block_size
        experts = _Cuts(cut) if self._experts is None else _Inline(self._experts, groups[0, :size], padding_slot)
        part = MicroBatch(
            token_ids=token_ids,
            positions=positions,
            lengths=lengths,
            attention=plans,
            experts=experts,
        )
        hidden_states: Tensor = self._model([part], self._cache)
        return hidden_states


def decode_graphs(
    model: CausalLM, cache: KVCache, attention: AttentionKernel, experts: Experts | None, *, max_sequences: int
) -> DecodeGraphs | None:
    """As `DecodeGraphs`; None where there is no GPU, or no attention that a graph can hold."""
    if cache.device.type != "cuda":
        return None
    if not isinstance(attention, PlansDecode):
        log.warning("steps are not captured as CUDA graphs: Triton is not installed")
        return None
    return DecodeGraphs(model, cache, attention, experts=experts, max_sequences=max_sequences)
