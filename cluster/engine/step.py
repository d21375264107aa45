"""One step: the scheduler plans it (`Batch`), a `Runner` computes it, the engine takes its `StepResult` in.

T: rows of a sequence in the step, H: hidden size, V: vocabulary.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from cluster.engine.sequence import Sequence
from cluster.errors import ShardUnavailable
from cluster.model.adapters import Adapter
from cluster.model.sampler import Sampled


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """A sequence and how many of its uncomputed tokens this step computes (at least one).

    num_ahead: new tokens that the step may bring beside the first one; the cache has room for them.
    draft: tokens, num_ahead at most, that may come next: the step computes a row for each, and finds how many do.
    """

    sequence: Sequence
    num_tokens: int
    num_ahead: int = 0
    draft: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        return self.num_tokens + len(self.draft)

    @property
    def row_token_ids(self) -> list[int]:
        """The tokens of its rows."""
        first = self.sequence.num_computed_tokens
        return [*self.sequence.token_ids[first : first + self.num_tokens], *self.draft]

    @property
    def completes(self) -> bool:
        """Whether nothing of it is left to compute after this step."""
        return self.num_tokens == self.sequence.num_uncomputed_tokens

    @property
    def samples(self) -> bool:
        """Whether its last token is computed, so that a new one is sampled."""
        return self.sequence.wants_tokens and self.completes


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's work. num_preempted: sequences that lost their blocks to make it possible.
    num_reused_tokens: tokens of sequences that begin here and whose keys and values were in the cache."""

    scheduled: tuple[ScheduledSequence, ...]
    num_preempted: int = 0
    num_reused_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(s.num_tokens for s in self.scheduled)

    @property
    def num_rows(self) -> int:
        return sum(s.num_rows for s in self.scheduled)


@dataclass(frozen=True, slots=True)
class StepResult:
    """The tokens, parts of results and errors that a step brought its sequences, by their number in the batch.

    tokens: new tokens of every sequence in their order, 1 + num_ahead at most; none where it does not sample, is lost
    or has failed. The keys and values of all but the last one are in the cache.
    parts: for the sequences that want no tokens and are not lost, what the step's rows give of their results
    (`outcomes.py`); float32 on the CPU.
    lost: the error of each sequence that needs an expert without a living copy. Nothing that the step computed for it
    counts.  epoch: of the plan that had no copy.
    failed: the exception of each sequence that met one; NoFiniteNumbers where the model's numbers for it are
    NaN or infinite, in any of its rows: its keys and values are then not to be used again.
    num_drafted, num_accepted: drafted tokens that the step has tried, and those of them that were right.
    """

    tokens: Seq[Seq[Sampled]]
    parts: Mapping[int, Tensor] = field(default_factory=dict)
    lost: Mapping[int, ShardUnavailable] = field(default_factory=dict)
    epoch: int = 0
    failed: Mapping[int, Exception] = field(default_factory=dict)
    num_drafted: int = 0
    num_accepted: int = 0

    def num_tokens(self, batch: Batch) -> tuple[int, int]:
        """Tokens that the step computed for good, of prompts and of answers."""
        prefill = decode = 0
        for i, s in enumerate(batch.scheduled):
            if i in self.lost or i in self.failed:
                continue
            if s.samples and s.sequence.num_output_tokens:
                decode += s.num_tokens + max(0, len(self.tokens[i]) - 1)
            else:
                prefill += s.num_tokens
        return prefill, decode


class Runner(Protocol):
    """Computes steps. Used by one thread."""

    @property
    def num_ahead(self) -> int:
        """New tokens that a step may bring a sequence beside the first one, at most."""

    @property
    def recovery_timeout_s(self) -> float:
        """How long a sequence waits for a lost expert."""

    def run(self, batch: Batch) -> StepResult:
        """Computes a step. Blocks. Raises ClusterError, and whatever a bug raises; the step may then be run again."""

    def logits(self, hidden_states: Tensor, adapter: Adapter | None = None) -> Tensor:
        """[T, H] -> [T, V] in the model's dtype, on its device, of rows that an adapter computed, or the base."""

    def has_news(self, epoch: int) -> bool:
        """Whether there is a plan of a higher epoch."""

    def wait_for_news(self, epoch: int, timeout_s: float) -> None:
        """Blocks until there is one, timeout_s at most."""

    def check_device(self) -> None:
        """Raises when the device answers every call with the fault of an earlier one: only a new process can go on."""
