"""A runner around another one, which traces steps with requests that are traced. Knows no tensors."""

from collections.abc import Callable, Sequence

from torch import Tensor

from cluster.engine.step import Batch, Runner, ScheduledSequence, StepResult
from cluster.model.adapters import Adapter
from cluster.tracing.engine import EngineTracing, Part, StepFacts


class TracedRunner:
    """As `Runner`. shard_ids: returns those that may get rows of the next step."""

    def __init__(self, runner: Runner, tracing: EngineTracing, shard_ids: Callable[[], Sequence[int]]) -> None:
        self.runner = runner
        self._tracing = tracing
        self._shard_ids = shard_ids

    @property
    def num_ahead(self) -> int:
        return self.runner.num_ahead

    @property
    def recovery_timeout_s(self) -> float:
        return self.runner.recovery_timeout_s

    def run(self, batch: Batch) -> StepResult:
        parts = [
            Part(traced, _phase(s), s.num_rows, s)
            for s in batch.scheduled
            if (traced := self._tracing.find(s.sequence.request_id)) is not None
        ]
        if not parts:
            return self.runner.run(batch)
        with self._tracing.step(parts, StepFacts(len(batch.scheduled), batch.num_rows, self._shard_ids())):
            return self.runner.run(batch)

    def logits(self, hidden_states: Tensor, adapter: Adapter | None = None) -> Tensor:
        return self.runner.logits(hidden_states, adapter)

    def has_news(self, epoch: int) -> bool:
        return self.runner.has_news(epoch)

    def wait_for_news(self, epoch: int, timeout_s: float) -> None:
        self.runner.wait_for_news(epoch, timeout_s)

    def check_device(self) -> None:
        self.runner.check_device()


def _phase(scheduled: ScheduledSequence) -> str:
    """Tokens of an earlier attempt at another engine are computed as a prompt is."""
    sequence = scheduled.sequence
    return "decode" if sequence.num_output_tokens > len(sequence.request.output_token_ids) else "prefill"
