"""One step's use of the experts: it loses sequences whose rows cannot be computed now, so that the others go on.

T: rows of a part, R: lost rows, H: hidden size, K: experts a token.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from cluster.errors import ShardUnavailable
from cluster.experts.adapted_ids import adapted, offset_of
from cluster.experts.direct import DirectFlight
from cluster.experts.dispatch import ExpertDispatcher
from cluster.experts.legs import DispatchFlight
from cluster.experts.transport import NOT_HERE


class EverySequenceLost(Exception):
    """No sequence would get anything from the step, so it ends. Stays between `PartExperts` and the runner."""


class StepExperts:
    """Knows which of a step's sequences have lost rows. The engine throws away the step's results for these.

    lost: the first error, by the sequence's number in the step.  epoch: of the first plan without a copy.
    hung: as in `Losses`.
    """

    def __init__(self, dispatcher: ExpertDispatcher, num_sequences: int) -> None:
        self.dispatcher = dispatcher
        self.num_sequences = num_sequences
        self.lost: dict[int, ShardUnavailable] = {}
        self.epoch = 0
        self.hung: set[tuple[int, int]] = set()
        self._parts: list[PartExperts] = []

    def part(
        self, first: int, num_tokens: Sequence[int], device: torch.device, adapters: Sequence[int] | None = None
    ) -> "PartExperts":
        """The experts for a micro-batch: the sequences from number `first` on, each with its number of rows.

        adapters: the number of each sequence's that changes routed experts, NO_ADAPTER for none; None where all are.
        """
        part = PartExperts(self, first, num_tokens, device)
        if adapters is not None:
            num_experts = self.dispatcher.plans.current().num_experts
            offsets = torch.tensor([offset_of(number, num_experts) for number in adapters])
            part.offsets = offsets.repeat_interleave(torch.tensor(num_tokens)).to(device)
        self._parts.append(part)
        return part

    @property
    def num_parts(self) -> int:
        return len(self._parts)

    def abandon(self) -> None:
        """The step is not finished: nobody will ask for the rows under way."""
        for part in self._parts:
            part.abandon()


class PartExperts:
    """The `Experts` of one micro-batch, as `StepExperts.part` says, and its `Losses`."""

    def __init__(self, step: StepExperts, first: int, num_tokens: Sequence[int], device: torch.device) -> None:
        self._step = step
        self.hung = step.hung
        self._first = first
        self._num_tokens = num_tokens
        self._device = device
        self._flight: DispatchFlight | DirectFlight | None = None
        self.offsets: Tensor | None = None  # [T], of the ids of rows with an adapter

    @cached_property
    def _owners(self) -> Tensor:
        """The number of each row's sequence in the step: [T] int64. Most steps lose no row and do not need it."""
        numbers = torch.arange(self._first, self._first + len(self._num_tokens))
        return numbers.repeat_interleave(torch.tensor(self._num_tokens)).to(self._device)

    def dispatch(
        self, layer_id: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> DispatchFlight | DirectFlight:
        """As `ExpertDispatcher.dispatch`; rows of lost sequences ask for no expert any more."""
        if self.offsets is not None:
            topk_ids = adapted(topk_ids, self.offsets)
        if self._step.lost:
            lost = torch.isin(self._owners, torch.tensor(list(self._step.lost), device=self._owners.device))
            topk_ids = topk_ids.masked_fill(lost.unsqueeze(1), NOT_HERE)
        dispatch, alone = self._step.dispatcher.dispatch, self._step.num_parts == 1
        self._flight = dispatch(layer_id, hidden_states, topk_ids, topk_weights, alone=alone)
        return self._flight

    def combine(self, flight: DispatchFlight | DirectFlight) -> Tensor:
        """As `ExpertDispatcher.combine`, where [T, H] has sums without meaning for rows of lost sequences.

        Raises EverySequenceLost.
        """
        out = self._step.dispatcher.combine(flight, self)
        if len(self._step.lost) == self._step.num_sequences:
            raise EverySequenceLost
        return out

    def abandon(self) -> None:
        if self._flight is not None:
            self._flight.abandon()

    def lose(self, rows: Tensor, error: ShardUnavailable) -> None:
        """As `Losses.lose`."""
        if not self._step.lost:
            self._step.epoch = self._step.dispatcher.epoch
        for number in self._owners[rows].tolist():
            self._step.lost.setdefault(number, error)
