"""Several tokens a step: a drafter guesses what comes next, and a step computes the guesses as rows beside its own.

Knows no tensors. A sequence gets the tokens that it would get one at a time (`runner.py`); only their number in a step
depends on the drafts, on measured times and on the rest of the batch.
"""

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Protocol

from torch import Tensor

from cluster.engine.payoff import Chance
from cluster.engine.sequence import Sequence
from cluster.engine.step import Batch, Runner, StepResult
from cluster.errors import Unavailable
from cluster.model.adapters import Adapter

log = logging.getLogger(__name__)


class Drafter(Protocol):
    """Guesses the next tokens of sequences. Used by one thread."""

    @property
    def prior(self) -> float:
        """The share of its tokens that is right, before any of a sequence's were tried."""

    @property
    def steady(self) -> bool:
        """Whether the last drafts took the time that drafts take, and nothing else was done for the first of them."""

    def offers(self, sequences: Seq[Sequence], rooms: Seq[int]) -> list[int]:
        """Returns how many tokens each draft can have. rooms: how many at most."""

    def drafts(self, sequences: Seq[Sequence], lengths: Seq[int]) -> list[tuple[int, ...]]:
        """Returns drafts of these lengths, or shorter ones. Called after each `offers`, with no more than it offered.
        Blocks. May raise anything: the step then goes without."""


class Chooses(Protocol):
    """As `Payoff`."""

    def lengths(self, chances: Seq[Chance], room: int) -> list[int]: ...

    def record(self, num_sequences: int, num_drafted: int, seconds: float) -> None: ...


class SpeculatingRunner:
    """A `Runner` around another one, which takes drafts.

    Steps that compute prompts have no drafts: their times differ by the prompts' lengths, so nothing could be learnt
    from them.
    max_rows: of a step.  payoff: chooses how much of the drafts is tried.
    """

    def __init__(
        self,
        runner: Runner,
        drafter: Drafter,
        payoff: Chooses,
        *,
        num_ahead: int,
        max_rows: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.runner = runner
        self.drafter = drafter
        self.payoff = payoff
        self._num_ahead = num_ahead
        self._max_rows = max_rows
        self._clock = clock

    @property
    def num_ahead(self) -> int:
        return self._num_ahead

    @property
    def recovery_timeout_s(self) -> float:
        return self.runner.recovery_timeout_s

    def has_news(self, epoch: int) -> bool:
        return self.runner.has_news(epoch)

    def wait_for_news(self, epoch: int, timeout_s: float) -> None:
        self.runner.wait_for_news(epoch, timeout_s)

    def logits(self, hidden_states: Tensor, adapter: Adapter | None = None) -> Tensor:
        return self.runner.logits(hidden_states, adapter)

    def check_device(self) -> None:
        self.runner.check_device()

    def run(self, batch: Batch) -> StepResult:
        """As `Runner.run`. An exception or a lost expert that a draft meets is no sequence's: it is run without."""
        if not all(s.samples and s.num_tokens == 1 for s in batch.scheduled):
            return self.runner.run(batch)
        started = self._clock()
        drafted = self._drafted(batch)
        num_drafted = drafted.num_rows - batch.num_rows
        if not num_drafted:
            result = self.runner.run(batch)
        else:
            try:
                result = self.runner.run(drafted)
            except Unavailable:
                raise
            except Exception as error:  # noqa: BLE001 it may be the drafts', and then the step can do without them
                self.check_device()
                log.warning("a step is run again without drafts: %s: %s", type(error).__name__, error)
                return self.runner.run(batch)
            result = self._again_where_lost(batch, drafted, self._observed(drafted, result))
        if not result.lost and not result.failed and (not num_drafted or self.drafter.steady):
            self.payoff.record(len(batch.scheduled), num_drafted, self._clock() - started)
        return result

    def _drafted(self, batch: Batch) -> Batch:
        sequences = [s.sequence for s in batch.scheduled]
        offers = self.drafter.offers(sequences, [s.num_ahead for s in batch.scheduled])
        prior = self.drafter.prior
        chances = [(n, s.drafting.acceptance.share(prior)) for n, s in zip(offers, sequences, strict=True)]
        lengths = self.payoff.lengths(chances, self._max_rows - batch.num_rows)
        try:
            drafts = self.drafter.drafts(sequences, lengths)
        except Exception as error:  # noqa: BLE001 no request asked for drafts
            self.check_device()
            log.warning("a step goes without drafts: %s: %s", type(error).__name__, error)
            return batch
        parts = [replace(s, draft=draft) for s, draft in zip(batch.scheduled, drafts, strict=True)]
        for part in parts:
            part.sequence.drafting.num_drafted += len(part.draft)
        return replace(batch, scheduled=tuple(parts))

    def _observed(self, drafted: Batch, result: StepResult) -> StepResult:
        """Keeps and counts which drafted tokens were right."""
        num_drafted = num_accepted = 0
        for s, tokens in zip(drafted.scheduled, result.tokens, strict=True):
            if s.draft and tokens:
                s.sequence.drafting.acceptance.observe(len(tokens) - 1, len(s.draft))
                num_drafted += len(s.draft)
                num_accepted += len(tokens) - 1
        return replace(result, num_drafted=num_drafted, num_accepted=num_accepted)

    def _again_where_lost(self, batch: Batch, drafted: Batch, result: StepResult) -> StepResult:
        """A drafted token may need an expert that its sequence does not: those that are lost are run without drafts."""
        numbers = [i for i in result.lost if drafted.scheduled[i].draft]
        if not numbers:
            return result
        again = self.runner.run(Batch(tuple(batch.scheduled[i] for i in numbers)))
        tokens, failed = list(result.tokens), dict(result.failed)
        lost = {i: error for i, error in result.lost.items() if i not in numbers}
        for place, i in enumerate(numbers):
            tokens[i] = again.tokens[place]
            if place in again.lost:
                lost[i] = again.lost[place]
            if place in again.failed:
                failed[i] = again.failed[place]
        return replace(result, tokens=tokens, lost=lost, epoch=result.epoch or again.epoch, failed=failed)
