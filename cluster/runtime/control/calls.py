"""The controller's calls about placement."""

from cluster.runtime.control.changes import PlacementChanges
from cluster.runtime.control.state import ClusterState


class PlacementCalls:
    """Each raises the failure that no shards can come up for."""

    state: ClusterState
    _changes: PlacementChanges | None

    async def _start(self) -> None: ...

    async def scale(self, num_shards: int) -> str:
        """Adds or removes shards one at a time; returns what was done. Raises SetupError for what cannot be."""
        return await (await self._placement()).scale(num_shards)

    async def rebalance(self) -> str:
        """Follows the measured load; returns what was done. Raises SetupError."""
        return await (await self._placement()).rebalance()

    async def shuffle(self, num_swaps: int, seed: int) -> str:
        """As `PlacementChanges.shuffle`. Raises ClusterError."""
        return await (await self._placement()).shuffle(num_swaps, seed)

    async def roll(self) -> str:
        """As `PlacementChanges.roll`. Raises SetupError."""
        return await (await self._placement()).roll()

    async def _placement(self) -> PlacementChanges:
        await self._start()
        if self._changes is None:
            assert self.state.failure is not None
            raise self.state.failure
        return self._changes
