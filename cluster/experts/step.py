"""One step's use of the experts: its sequences whose rows cannot be computed now, so that the others need not wait.

T: rows of a part, R: lost rows, H: hidden size, K: experts a token.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from cluster.errors import ShardUnavailable
from cluster.experts.dispatch import ExpertDispatcher
from cluster.experts.legs import DispatchFlight
from cluster.experts.transport import NOT_HERE


class EverySequenceLost(Exception):
    """None is left for whom the step would be worth finishing. Stays between `PartExperts` and the runner."""


class StepExperts:
    """Which of a step's sequences have lost rows. What is computed for those is of no use, and is thrown away.

    lost: for the number of such a sequence in the step, the first error.  epoch: of the first plan that had no copy.
    hung: as in `Losses`.
    """

    def __init__(self, dispatcher: ExpertDispatcher, num_sequences: int) -> None:
        self.dispatcher = dispatcher
        self.num_sequences = num_sequences
        self.lost: dict[int, ShardUnavailable] = {}
        self.epoch = 0
        self.hung: set[tuple[int, int]] = set()
        self._parts: list[PartExperts] = []

    def part(self, first: int, num_tokens: Sequence[int], device: torch.device) -> "PartExperts":
        """The experts for a micro-batch of the sequences from number `first` on, with so many rows each."""
        self._parts.append(PartExperts(self, first, num_tokens, device))
        return self._parts[-1]

    def abandon(self) -> None:
        """The step is not finished: what is under way is not asked for."""
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
        self._flight: DispatchFlight | None = None

    @cached_property
    def _owners(self) -> Tensor:
        """[T] int64: the number of each row's sequence in the step. Most steps lose none and need it not."""
        numbers = torch.arange(self._first, self._first + len(self._num_tokens))
        return numbers.repeat_interleave(torch.tensor(self._num_tokens)).to(self._device)

    def dispatch(self, layer_id: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> DispatchFlight:
        """As `ExpertDispatcher.dispatch`; rows of sequences that are lost already stay here."""
        if self._step.lost:
            lost = torch.isin(self._owners, torch.tensor(list(self._step.lost), device=self._owners.device))
            topk_ids = topk_ids.masked_fill(lost.unsqueeze(1), NOT_HERE)
        self._flight = self._step.dispatcher.dispatch(layer_id, hidden_states, topk_ids, topk_weights)
        return self._flight

    def combine(self, flight: DispatchFlight) -> Tensor:
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
