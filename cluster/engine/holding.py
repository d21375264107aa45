"""Running sequences that need an expert without a living copy: they keep their blocks and let the others go on."""

from collections.abc import Callable, Mapping, Sequence

from cluster.engine.sequence import Sequence as EngineSequence
from cluster.engine.step import Runner
from cluster.errors import ShardUnavailable

HOLD_S = 1.0  # a held sequence tries again at the latest after so long: a broken connection brings no news of the plan
POLL_S = 0.05  # when all are held the engine looks up so often: a new request may need other experts


class Holding:
    """Used by one thread. running: the scheduler's list."""

    def __init__(self, running: Sequence[EngineSequence], runner: Runner, clock: Callable[[], float]) -> None:
        self._running = running
        self._runner = runner
        self._clock = clock
        self._release_at = 0.0  # on the clock, in seconds
        self._beyond_epoch = 0

    def __len__(self) -> int:
        """May be called from any thread."""
        return sum(sequence.held for sequence in list(self._running))

    def hold(self, lost: Mapping[EngineSequence, ShardUnavailable], epoch: int) -> list[EngineSequence]:
        """Holds sequences that a step has lost; returns those of them that have waited for recovery_timeout_s.

        epoch: of the plan that has no copy of their experts.
        """
        now = self._clock()
        if lost and not len(self):
            self._release_at, self._beyond_epoch = now + HOLD_S, epoch
        for sequence in lost:
            if sequence.lost_since is None:
                sequence.lost_since = now
            sequence.held = True
        return [s for s in lost if s.lost_since is not None and now - s.lost_since >= self._runner.recovery_timeout_s]

    def release(self) -> None:
        """Lets held sequences go on when the plan has changed, or to see whether it works again."""
        if len(self) and (self._clock() >= self._release_at or self._runner.has_news(self._beyond_epoch)):
            for sequence in self._running:
                sequence.held = False

    def wait(self) -> None:
        """Blocks for a moment, or until the plan changes."""
        self._runner.wait_for_news(self._beyond_epoch, POLL_S)
