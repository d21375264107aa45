"""The requests that wait for a shard: which become one product, their rows on the way into it and out of it."""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from cluster.experts.transport import ExpertBatch
from cluster.stream.buffers import Staging
from cluster.stream.peer import Peer, Request


class WaitingRequests:
    """In the order of their arrival."""

    def __init__(self, max_group_rows: int) -> None:
        self._max_group_rows = max_group_rows
        self._requests: deque[Request] = deque()

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: Request) -> None:
        self._requests.append(request)

    def of(self, peer: Peer) -> list[Request]:
        return [request for request in self._requests if request.peer is peer]

    def drop(self, peer: Peer) -> list[Request]:
        """Takes out a caller's requests and returns them."""
        dropped = self.of(peer)
        for request in dropped:
            self._requests.remove(request)
        return dropped

    def next_group(self) -> list[Request]:
        """Takes out the oldest request and all others of its layer and dtype, as far as they fit."""
        first = self._requests[0].head
        group: list[Request] = []
        others: deque[Request] = deque()
        rows = 0
        for request in self._requests:
            head = request.head
            same = (head.layer_id, head.dtype, head.hidden_size, head.topk) == (
                first.layer_id, first.dtype, first.hidden_size, first.topk)  # fmt: skip
            if same and (not group or rows + head.rows <= self._max_group_rows):
                group.append(request)
                rows += head.rows
            else:
                others.append(request)
        self._requests = others
        return group


def one_batch(group: Sequence[Request], device: torch.device) -> ExpertBatch:
    """The rows of all requests of a group, in their order, on the device."""
    batches = [request.batch(device) for request in group]
    if len(batches) == 1:
        return batches[0]
    return ExpertBatch(
        layer_id=batches[0].layer_id,
        epoch=max(batch.epoch for batch in batches),
        hidden_states=torch.cat([batch.hidden_states for batch in batches]),
        topk_ids=torch.cat([batch.topk_ids for batch in batches]),
        topk_weights=torch.cat([batch.topk_weights for batch in batches]),
    )


def staged_parts(group: Sequence[Request], out: Tensor, staging: Staging) -> list[tuple[Tensor, Tensor | None] | None]:
    """Each caller's part of a product [T, H]: None where it is in his memory now, else as `Staging.copy` says.

    From a GPU the parts are there once the current stream has come so far.
    """
    parts: Sequence[Tensor] = [out]
    if len(group) > 1:
        parts = out.split([request.head.rows for request in group])  # type: ignore[no-untyped-call]
    staged: list[tuple[Tensor, Tensor | None] | None] = []
    for request, part in zip(group, parts, strict=True):
        if request.head.slot:
            request.shared_rows().copy_(part)
            staged.append(None)
        else:
            staged.append(staging.copy(part))
    return staged
