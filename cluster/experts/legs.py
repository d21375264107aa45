"""Rows on their way to the shards and back: values, no behaviour of a dispatcher. R: rows of a leg."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from cluster.errors import ShardUnavailable
from cluster.experts.transport import ExpertBatch, Flight


@dataclass(slots=True)
class Leg:
    """One call to one shard: a part of a `DispatchFlight`.

    rows: [R] int64 into the sender's rows, None for all of them.
    flight: None when nothing more comes from it: it has answered, has failed, or was never sent.
    heard_at: when its shard last showed that it works; at first, when the call was made.
    """

    shard_id: int
    rows: Tensor | None
    batch: ExpertBatch
    sent_at: float
    flight: Flight | None
    heard_at: float

    @property
    def num_rows(self) -> int:
        return self.batch.hidden_states.shape[0]

    def abandon(self) -> None:
        """Nobody will ask for its answer."""
        if self.flight is not None:
            self.flight.abandon()
            self.flight = None


@dataclass(frozen=True, slots=True)
class DispatchFlight:
    """Rows under way, for `combine`: the legs in shard order, and a tensor with the answer's shape and dtype."""

    legs: list[Leg]
    like: Tensor

    def abandon(self) -> None:
        """Nobody will combine it."""
        for leg in self.legs:
            leg.abandon()


class Losses(Protocol):
    """A step that can go on without some of its rows.

    hung: (epoch, shard) for each shard whose answer the step has waited for in vain. It waits for none of them again.
    """

    hung: set[tuple[int, int]]

    def lose(self, rows: Tensor, error: ShardUnavailable) -> None:
        """rows: [R] int64 into a flight's rows, which cannot be computed now."""


def add_rows(out: Tensor, rows: Tensor | None, value: Tensor) -> None:
    """out: [T, H].  rows: [R], None for all.  value: [R, H]."""
    if rows is None:
        out.add_(value)
    else:
        out.index_add_(0, rows, value)
