"""The shards that a cluster has: 0, 1, 2, …, without a gap. The supervision adds and removes them."""

from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, Protocol

from cluster.config import ClusterConfig
from cluster.config.lora import AdapterList
from cluster.runtime.workers.protocol import Slice
from cluster.status import ShardStatus


class Configured(Protocol):
    """Knows the configuration and the adapters as they are now: they change while shards run."""

    @property
    def config(self) -> ClusterConfig: ...

    @property
    def adapters(self) -> AdapterList:
        """Those that change routed experts."""

    @property
    def draining(self) -> Mapping[str, float]:
        """The nodes that Ray drains, on which nothing starts any more, and until when they stay."""


class Shard(Protocol):
    """One shard as the controller handles it.

    handle: its actor while it is up, with its slice loaded; None else.  leaves: its end is meant.  node_id: where it
    is, or was meant to be while it is not there yet.
    """

    status: ShardStatus
    handle: Any | None
    leaves: bool

    @property
    def shard_id(self) -> int: ...

    @property
    def node_id(self) -> str: ...

    async def start(self, best_node: Callable[[], Awaitable[str | None]]) -> None:
        """Finds the running actor, takes a spare process or starts one; waits for the cluster to have room.

        best_node: the id of the node where a new one had best be.
        """

    async def load(self, experts: Slice) -> None:
        """Makes the actor hold `experts`; nothing is read when it does. Raises RayActorError, RayTaskError."""

    def up(self) -> None:
        """Its slice is loaded."""

    async def lost(self) -> str:
        """Returns when the actor is dead, or answers nothing for shard_timeout_s, or does not get on with its work for
        so long, and is killed; says which. A computation that goes on may take as long as it likes."""

    def down(self) -> None:
        """Its actor is gone."""

    def retire(self) -> None:
        """Ends the actor on purpose: its successor is no fault."""

    def remove(self) -> None:
        """Ends the actor and gives its place back. Blocks while Ray's GCS is away."""


class Shards:
    """By id, in their order."""

    def __init__(self) -> None:
        self._shards: list[Shard] = []

    def __len__(self) -> int:
        return len(self._shards)

    def __iter__(self) -> Iterator[Shard]:
        return iter(tuple(self._shards))

    def __getitem__(self, shard_id: int) -> Shard:
        return self._shards[shard_id]

    def add(self, shard: Shard) -> None:
        assert shard.shard_id == len(self._shards)
        self._shards.append(shard)

    def pop(self) -> Shard:
        """Takes the last one out."""
        return self._shards.pop()

    def put(self, shard: Shard) -> None:
        """In place of the one of its id."""
        self._shards[shard.shard_id] = shard

    def handles(self) -> dict[int, Any]:
        """The actors of the shards that are up."""
        return {shard.shard_id: shard.handle for shard in self._shards if shard.handle is not None}

    def take_traces(self) -> frozenset[int]:
        """Those that are up and take the spans of a batch with it."""
        up = (shard for shard in self._shards if shard.handle is not None)
        return frozenset(s.shard_id for s in up if s.status.process is not None and s.status.process.takes_traces)

    def all_up(self) -> bool:
        return all(shard.handle is not None for shard in self._shards)
