"""The seam between attention and experts: one batch of rows out, one flight back. Knows no carrier and no plan.

`LocalTransport` carries by a function call. The Ray carrier lives in `runtime/`.
T: rows in the batch, H: hidden size, K: experts a token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from cluster.errors import ShardUnavailable
from cluster.experts.shard import ExpertShard

NOT_HERE = -1  # in ExpertBatch.topk_ids: this slot's expert is computed by another shard


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertBatch:
    """Rows for one shard at one layer.

    hidden_states: [T, H] in the model's dtype.  topk_ids: [T, K] int64 logical expert ids, NOT_HERE where another
    shard computes that slot.  topk_weights: [T, K] float32.  epoch: of the plan that chose the shard.
    """

    layer_id: int
    epoch: int
    hidden_states: Tensor
    topk_ids: Tensor
    topk_weights: Tensor

    @property
    def num_bytes(self) -> int:
        return self.hidden_states.nbytes + self.topk_ids.nbytes + self.topk_weights.nbytes

    def of_rows(self, rows: Tensor | slice) -> "ExpertBatch":
        """rows: [T] bool, or a slice, which copies nothing."""
        return replace(
            self,
            hidden_states=self.hidden_states[rows],
            topk_ids=self.topk_ids[rows],
            topk_weights=self.topk_weights[rows],
        )


class Flight(Protocol):
    """A batch under way."""

    def result(self, timeout_s: float) -> Tensor:
        """Blocks for the weighted sums: [T, H] in the batch's dtype.

        Raises TimeoutError when they are not there yet, and may then be asked again; ShardUnavailable.
        """

    def works(self) -> bool:
        """Whether the shard has shown since the last such question that it gets on, with this batch or one before it.
        Does not block. Ask when `result` has raised TimeoutError."""

    def abandon(self) -> None:
        """Nobody will ask any more: an answer that still comes is dropped."""


class ExpertTransport(Protocol):
    """Carries batches to shards. Used by one thread."""

    def submit(self, shard_id: int, batch: ExpertBatch) -> Flight:
        """Sends without waiting. Raises ShardUnavailable when the shard is known to be gone."""

    def trace(self, places: Mapping[int, bytes]) -> None:
        """Tells shards the spans to which the batches from now on belong, packed (`tracing.contexts`), by the shards'
        ids; none ends that. A shard of an older version is not told."""

    def close(self) -> None:
        """Lets go of connections; shards live on."""


@dataclass(frozen=True, slots=True)
class LocalFlight:
    value: Tensor

    def result(self, timeout_s: float) -> Tensor:
        return self.value

    def works(self) -> bool:
        return True

    def abandon(self) -> None:
        pass


class LocalTransport:
    """Shards in this process; `submit` computes at once."""

    def __init__(self, shards: Mapping[int, ExpertShard]) -> None:
        self.shards = shards

    def submit(self, shard_id: int, batch: ExpertBatch) -> LocalFlight:
        if shard_id not in self.shards:
            raise ShardUnavailable(f"shard {shard_id} is not in this process", shard_id)
        return LocalFlight(
            self.shards[shard_id].forward(batch.layer_id, batch.hidden_states, batch.topk_ids, batch.topk_weights)
        )

    def trace(self, places: Mapping[int, bytes]) -> None:
        pass

    def close(self) -> None:
        pass
