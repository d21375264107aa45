"""The `ExpertTransport` made of streams. Knows no sockets, no Ray.

A stream that breaks costs its step one call over the fallback carrier; the next step finds it connected again.
"""

import logging
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cluster.errors import ProtocolError, ShardUnavailable
from cluster.experts.direct import MOST_ROWS, Lanes
from cluster.experts.transport import ExpertBatch, ExpertTransport, Flight
from cluster.stream.connection import StreamBroken, StreamConnection
from cluster.stream.frames import StreamOffer
from cluster.stream.lanes import LANE_DTYPES, StreamLanes, has_lanes
from cluster.stream.region import SLOT_BYTES

log = logging.getLogger(__name__)

RECONNECT_INTERVAL_S = 1.0  # after a connection that failed; the fallback carries meanwhile


class OfferSource(Protocol):
    """Tells where shards listen."""

    def incarnation(self, shard_id: int) -> Hashable:
        """Differs for a shard and its successor. Raises ShardUnavailable while no shard has this id."""

    def offer(self, shard_id: int) -> StreamOffer:
        """Asks the shard. Blocks. Raises ShardUnavailable."""


@dataclass(slots=True)
class StreamFlight:
    """A batch on a stream; it goes over the fallback when the stream breaks under it."""

    transport: "StreamTransport"
    connection: StreamConnection
    request_id: int
    batch: ExpertBatch
    second: Flight | None = None
    num_heard: int = 0

    def result(self, timeout_s: float) -> Tensor:
        deadline = time.monotonic() + timeout_s
        if self.second is None:
            try:
                return self.connection.receive(self.request_id, self.batch.hidden_states, timeout_s)
            except StreamBroken as error:
                self.transport.forget(self.connection, str(error))
                self.second = self.transport.fall_back(self.connection.shard_id, self.batch, str(error))
        return self.second.result(max(0.0, deadline - time.monotonic()))

    def works(self) -> bool:
        if self.second is not None:
            return self.second.works()
        before, self.num_heard = self.num_heard, self.connection.num_heard
        return self.num_heard > before

    def abandon(self) -> None:
        if self.second is None:
            self.connection.abandon(self.request_id)
        else:
            self.second.abandon()


class StreamTransport:
    """A connection to each shard, made when first needed. Used by one thread.

    node: a name of this host.  fallback: carries batches while a stream is down; without a fallback the shard counts as
    lost then.
    timeout_s: a shard drops rows whose sender it has told nothing for so long.
    on_fallback: called with the shard's id for each batch that took it.
    """

    def __init__(
        self,
        offers: OfferSource,
        *,
        node: str,
        fallback: ExpertTransport | None,
        timeout_s: float,
        on_fallback: Callable[[int], None] = lambda shard_id: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._offers = offers
        self._node = node
        self._fallback = fallback
        self._timeout_s = timeout_s
        self._on_fallback = on_fallback
        self._clock = clock
        self._connections: dict[int, tuple[Hashable, StreamConnection]] = {}
        self._retry_at: dict[int, float] = {}
        self._num_interruptions = 0
        self._traces: Mapping[int, bytes] = {}

    def trace(self, places: Mapping[int, bytes]) -> None:
        """As of `ExpertTransport`."""
        self._traces = places
        for _, connection in list(self._connections.values()):
            self._tell(connection)
        if self._fallback is not None:
            self._fallback.trace(places)

    def _tell(self, connection: StreamConnection) -> None:
        """A connection that breaks over it is no loss: the next batch finds out. Lanes close before one that is told
        later, with a batch."""
        try:
            connection.trace(self._traces.get(connection.shard_id, b""))
        except StreamBroken as error:
            self.forget(connection, str(error))
        if not connection.span_news.is_told:
            self._num_interruptions += 1

    def submit(self, shard_id: int, batch: ExpertBatch) -> Flight:
        try:
            connection = self._connection(shard_id, batch.hidden_states.device)
        except StreamBroken as error:
            return self.fall_back(shard_id, batch, str(error))
        try:
            request_id = connection.send(batch, self._timeout_s)
            return self._flight(connection, request_id, batch)
        except StreamBroken as error:
            self.forget(connection, str(error))
            return self.fall_back(shard_id, batch, str(error))

    def open_lanes(
        self, shard_ids: Sequence[int], lane_of: np.ndarray, *, dtype: torch.dtype, hidden_size: int, epoch: int
    ) -> Lanes | None:
        """As of `LaneSource`."""
        if not has_lanes() or dtype not in LANE_DTYPES or MOST_ROWS * hidden_size * dtype.itemsize > SLOT_BYTES:
            return None
        try:
            connections = [self._connection(shard_id, torch.device("cpu")) for shard_id in shard_ids]
        except (StreamBroken, ShardUnavailable):
            return None
        if not all(connection.can_lend for connection in connections):
            return None
        before = self._num_interruptions
        return StreamLanes(
            connections, lane_of, dtype=dtype, hidden_size=hidden_size, epoch=epoch, timeout_s=self._timeout_s,
            is_open=lambda: self._num_interruptions == before, make_flight=self._flight,
        )  # fmt: skip

    def _flight(self, connection: StreamConnection, request_id: int, batch: ExpertBatch) -> StreamFlight:
        return StreamFlight(self, connection, request_id, batch, num_heard=connection.num_heard)

    def fall_back(self, shard_id: int, batch: ExpertBatch, why: str) -> Flight:
        """Sends over the other carrier. Raises ShardUnavailable."""
        if self._fallback is None:
            raise ShardUnavailable(f"the stream to shard {shard_id} is down: {why}", shard_id)
        self._on_fallback(shard_id)
        return self._fallback.submit(shard_id, batch)

    def forget(self, connection: StreamConnection, why: str) -> None:
        """Closes a broken connection; the next batch makes another."""
        connection.close()
        self._num_interruptions += 1
        known = self._connections.get(connection.shard_id)
        if known is not None and known[1] is connection:
            del self._connections[connection.shard_id]
            log.warning("the stream to shard %d broke: %s", connection.shard_id, why)

    def close(self) -> None:
        self._num_interruptions += 1
        for _, connection in self._connections.values():
            connection.close()
        self._connections.clear()
        if self._fallback is not None:
            self._fallback.close()

    def _connection(self, shard_id: int, device: torch.device) -> StreamConnection:
        """Raises StreamBroken if no connection can be made now, ShardUnavailable for a shard that is gone."""
        incarnation = self._offers.incarnation(shard_id)
        known = self._connections.get(shard_id)
        if known is not None:
            if known[0] == incarnation:
                return known[1]
            self.forget(known[1], "the shard has a successor")
        if self._clock() < self._retry_at.get(shard_id, 0.0):
            raise StreamBroken("it was down a moment ago")
        try:
            connection = StreamConnection(self._offers.offer(shard_id), shard_id, self._node, device)
        except (OSError, ProtocolError) as error:
            self._retry_at[shard_id] = self._clock() + RECONNECT_INTERVAL_S
            log.warning("no stream to shard %d: %s", shard_id, error)
            raise StreamBroken(str(error)) from error
        self._connections[shard_id] = (incarnation, connection)
        if self._traces:
            self._tell(connection)
        return connection
