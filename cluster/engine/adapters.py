"""The LoRA adapters of an engine, by the names that requests have for them. Knows no requests."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

from cluster.config.lora import AdapterList, AdapterSource
from cluster.errors import CheckpointError, NotFound
from cluster.model.adapters import Adapter

log = logging.getLogger(__name__)

LoadAdapter = Callable[[AdapterSource], Adapter]
"""Blocks. Raises CheckpointError."""
ShareAdapters = Callable[[AdapterList], None]
"""Gives those that change routed experts to their shards. Blocks. Raises ClusterError."""
MAX_SHOWN = 10  # names in a refusal


def share_with_nobody(_: AdapterList) -> None:
    """Somebody else does."""


@dataclass(frozen=True, slots=True)
class AdapterSetup:
    """given: the adapters that an engine begins with, but for those that cannot be loaded; None for all of its
    configuration's.  share: as of `Adapters`."""

    given: AdapterList | None = None
    share: ShareAdapters = share_with_nobody


class Adapters:
    """All methods may be called from any thread. A sequence keeps its adapter until it ends, whatever is unloaded.

    load: by default there are none to be had.  share: called before a list counts.
    """

    def __init__(self, load: LoadAdapter | None = None, share: ShareAdapters = share_with_nobody) -> None:
        self._load, self._share = load, share
        self._changing = threading.Lock()
        self._list = AdapterList()
        self._loaded: dict[str, Adapter] = {}

    @property
    def current(self) -> AdapterList:
        """Those that are loaded."""
        return self._list

    @property
    def names(self) -> tuple[str, ...]:
        return self._list.names

    @property
    def num_bytes(self) -> int:
        return sum(adapter.num_bytes for adapter in self._loaded.values())

    def follow(self, wanted: AdapterList) -> None:
        """Loads those that are not here, and lets the others go. Blocks. Raises CheckpointError; then nothing has
        changed. A list that is older than the last one changes nothing."""
        with self._changing:
            if wanted.version < self._list.version:
                return
            assert self._load is not None or not wanted.adapters, "this engine's model takes no adapters"
            here = set(self._list.adapters)
            loaded = {}
            for source in wanted.adapters:
                if source in here:
                    loaded[source.name] = self._loaded[source.name]
                elif self._load is not None:
                    loaded[source.name] = self._load(source)
            of_experts = tuple(source for source in wanted.adapters if loaded[source.name].has_experts)
            if of_experts or any(adapter.has_experts for adapter in self._loaded.values()):
                self._share(replace(wanted, adapters=of_experts))
            self._loaded, self._list = loaded, wanted

    def begin(self, wanted: AdapterList) -> None:
        """As `follow`, for an engine that starts: it starts without those that it cannot load, and says why."""
        for source in wanted.adapters:
            if source in self._list.adapters:
                continue
            try:
                self.follow(replace(self._list, adapters=(*self._list.adapters, source)))
            except CheckpointError as error:
                log.error("the adapter %s is not loaded: %s", source.name, error)
        here = tuple(source for source in wanted.adapters if source in self._list.adapters)
        self.follow(replace(wanted, adapters=here))

    def load(self, name: str, directory: str) -> None:
        """Loads one, in place of another one of that name. Blocks. Raises CheckpointError; then nothing has changed."""
        self.follow(self._list.loaded(name, directory, self._list.version + 1))

    def unload(self, name: str) -> None:
        """Raises NotFound."""
        self.find(name)
        self.follow(self._list.unloaded(name, self._list.version + 1))

    def find(self, name: str) -> Adapter:
        """Raises NotFound, with the names that there are."""
        adapter = self._loaded.get(name)
        if adapter is None:
            known = ", ".join(list(self._loaded)[:MAX_SHOWN]) or "none"
            raise NotFound(f"the adapter {name[:100]!r} is not loaded; loaded: {known}", "adapter")
        return adapter
