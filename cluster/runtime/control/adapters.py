"""The LoRA adapters of a running cluster: which there are, and how every engine and every shard gets them.

The engines keep the list as well, with its version: a controller that comes new asks them for it. One that starts asks
for it when its model is loaded. Shards get those that change routed experts before any engine may send rows for them,
and keep them until no request needs them.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from cluster.checkpoint.adapters import open_adapter
from cluster.checkpoint.model_files import served_name
from cluster.checkpoint.opening import open_checkpoint
from cluster.config import ClusterConfig
from cluster.config.lora import AdapterList, AdapterSource, check_names
from cluster.errors import ClusterError, InvalidRequest, NotFound, SetupError
from cluster.inputs import shown
from cluster.runtime.control.engine_adapters import give, in_use, list_of
from cluster.runtime.control.engines import Engines
from cluster.runtime.control.shard_process import give_shard
from cluster.runtime.control.shards import Shards
from cluster.runtime.control.state import ClusterState
from cluster.status import ReplicaStatus

log = logging.getLogger(__name__)

RELEASE_INTERVAL_S = 1.0  # between two looks whether a request needs an adapter that was unloaded


class SharedAdapters:
    """For one event loop."""

    def __init__(
        self,
        state: ClusterState,
        shards: Shards,
        engines: Engines,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._state, self._shards, self._engines, self._wall_clock = state, shards, engines, wall_clock
        self._list = AdapterList.configured(state.config.lora_adapters)
        self._changing = asyncio.Lock()
        self._releasing: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def current(self) -> AdapterList:
        """Those that all engines have."""
        return self._list

    async def begin(self) -> None:
        """Before the first shard is made: finds out which of the configuration's adapters shards need."""
        async with self._changing:
            config = self._state.config
            described = [await asyncio.to_thread(_described, config, source) for source in self._list.adapters]
            self._list = replace(self._list, adapters=tuple(described))
            self._state.adapters = _of_experts(self._list)

    async def load(self, name: str, directory: str, *, in_place: bool) -> str:
        """Returns what was done. Raises InvalidRequest, SetupError, Unavailable; then nothing has changed.

        in_place: instead of another adapter of that name.
        """
        check_names({name: directory})
        if not Path(directory).is_absolute():
            raise InvalidRequest(
                f"lora_path is {shown(directory)}, an absolute path is needed: each node reads it", "lora_path"
            )
        async with self._changing:
            config, known = self._state.config, self._list.find(name)
            if known is not None and not in_place:
                raise InvalidRequest(
                    f"the adapter {name!r} is loaded already: unload it first, or load in place", "lora_name"
                )
            if known is None and len(self._list.adapters) >= config.max_loras:
                raise SetupError(
                    f"{config.max_loras} adapters are loaded, as many as max_loras allows: unload one first"
                )
            has_experts = await asyncio.to_thread(_check, config, name, directory)
            wanted = self._list.loaded(name, directory, self._next_version(), has_experts=has_experts)
            count = await self._share(wanted)
        return f"the adapter {name} is loaded at {count} attention replicas"

    async def unload(self, name: str) -> str:
        """Returns what was done. Requests that run go on to their end. Raises NotFound, Unavailable."""
        async with self._changing:
            if self._list.find(name) is None:
                known = ", ".join(self._list.names[:10]) or "none"
                raise NotFound(f"the adapter {name[:100]!r} is not loaded; loaded: {known}", "lora_name")
            await self._share(self._list.unloaded(name, self._next_version()))
        return f"the adapter {name} is unloaded"

    async def follow(self, before: ClusterConfig, config: ClusterConfig) -> None:
        """Takes over what another configuration changes in its adapters; a fault is noted."""
        old, new = before.lora_adapters or {}, config.lora_adapters or {}
        for name in [name for name in old if name not in new and self._list.find(name) is not None]:
            await self._noting(self.unload(name))
        for name in [name for name in new if old.get(name) != new[name]]:
            await self._noting(self.load(name, new[name], in_place=True))

    async def recover(self, wait_s: float) -> None:
        """Takes the newest list of the engines over, once they have had the time to register."""
        async with self._changing:
            await asyncio.sleep(wait_s)
            asked = await asyncio.gather(*(list_of(engine) for engine in self._alive()))
            lists = [one for one in asked if one is not None]
            # An engine that could not read one when it started has a shorter list of the same version.
            self._list = max((self._list, *lists), key=lambda one: (one.version, len(one.adapters)))
            try:
                await self.adapt_shards(_of_experts(self._list))
            except ClusterError as error:
                log.error("adapters: %s", error)
            for engine in self._alive():  # one that started meanwhile knows the configuration's alone
                self._give_later(engine, self._list)

    async def adapt_shards(self, wanted: AdapterList) -> None:
        """Gives all shards that are up, and those that come, the adapters that change routed experts. Raises
        ClusterError."""
        if wanted.adapters == self._state.adapters.adapters:
            return
        self._state.adapters = wanted
        given = (give_shard(shard_id, actor, wanted) for shard_id, actor in self._shards.handles().items())
        failures = [one for one in await asyncio.gather(*given, return_exceptions=True) if one is not None]
        for failure in failures:
            if not isinstance(failure, ray.exceptions.RayActorError):  # its successor gets them
                raise failure

    def _next_version(self) -> float:
        return max(self._wall_clock(), self._list.version + 1)

    def _alive(self) -> list[ReplicaStatus]:
        return [engine for engine in self._engines.known() if engine.engine is not None]

    async def _share(self, wanted: AdapterList) -> int:
        """Gives all engines the list; returns their number. Raises the first failure, and takes all back then."""
        engines, before = self._alive(), self._state.adapters
        more = (*before.adapters, *(one for one in _of_experts(wanted).adapters if one not in before.adapters))
        try:
            await self.adapt_shards(replace(wanted, adapters=more))
        except ClusterError:
            with suppress(ClusterError):
                await self.adapt_shards(replace(before, version=wanted.version))
            raise
        results = await asyncio.gather(*(self._give(engine, wanted) for engine in engines), return_exceptions=True)
        failures = [result for result in results if isinstance(result, BaseException)]
        if failures:
            known = self._list.adapters
            self._list = AdapterList(version=wanted.version + 1, adapters=known, next_number=wanted.next_number)
            await asyncio.gather(*(self._give(engine, self._list) for engine in engines), return_exceptions=True)
            self._release_later()
            raise failures[0]
        self._list = wanted
        self._release_later()
        log.info("adapters: %s", ", ".join(wanted.names) or "none")
        return len(engines)

    async def _give(self, engine: ReplicaStatus, wanted: AdapterList) -> None:
        """Raises CheckpointError, Unavailable. An engine that starts gets it when it has started."""
        if engine.process.takes_adapters and await list_of(engine) is None:
            self._give_later(engine, wanted)
        else:
            await give(engine, wanted)

    def _give_later(self, engine: ReplicaStatus, wanted: AdapterList) -> None:
        task = asyncio.create_task(self._noting(give(engine, wanted, timeout_s=None)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _release_later(self) -> None:
        """Takes from the shards what no request needs any more, once that is so."""
        if self._releasing is None or self._releasing.done():
            self._releasing = asyncio.create_task(self._release())

    async def _release(self) -> None:
        while any(source not in self._list.adapters for source in self._state.adapters.adapters):
            await asyncio.sleep(RELEASE_INTERVAL_S)
            async with self._changing:
                try:
                    used = await asyncio.gather(*(in_use(engine) for engine in self._alive()))
                except TimeoutError:
                    continue
                needed = {source.number for source in self._list.adapters}.union(*used)
                kept = tuple(one for one in self._state.adapters.adapters if one.number in needed)
                try:
                    await self.adapt_shards(AdapterList(version=self._next_version(), adapters=kept))
                except ClusterError as error:
                    log.error("adapters: %s", error)

    async def _noting(self, change: Any) -> None:
        try:
            await change
        except ClusterError as error:
            log.error("adapters: %s", error)
            self._state.note(f"an adapter is missing: {error}")


def check_free(config: ClusterConfig, names: Iterable[str]) -> None:
    """Raises SetupError for an adapter with a name of the model itself."""
    taken = {config.model_id or served_name(config.model), *config.aliases}
    for name in names:
        if name in taken:
            raise SetupError(f"the adapter {name!r} has the model's own name: give it another one")


def _check(config: ClusterConfig, name: str, directory: str) -> bool:
    """Whether it changes routed experts. Raises SetupError, CheckpointError for an adapter that does not fit the
    cluster's model."""
    check_free(config, [name])
    return open_adapter(directory, open_checkpoint(config.model).config, config.max_lora_rank).has_experts


def _described(config: ClusterConfig, source: AdapterSource) -> AdapterSource:
    """As it is where it cannot be read: the engines say so."""
    try:
        return replace(source, has_experts=_check(config, source.name, source.directory))
    except SetupError as error:
        log.error("the configuration's adapters: %s", error)
        return source


def _of_experts(every: AdapterList) -> AdapterList:
    return replace(every, adapters=tuple(source for source in every.adapters if source.has_experts))


class AdapterCalls:
    """The controller's calls about adapters."""

    adapters: SharedAdapters

    async def _start(self) -> None: ...

    async def load_adapter(self, name: str, directory: str, in_place: bool = False) -> str:
        """As `SharedAdapters.load`."""
        await self._start()
        return await self.adapters.load(name, directory, in_place=in_place)

    async def adapt_shards(self, wanted: AdapterList) -> None:
        """As `SharedAdapters.adapt_shards`, for an engine that has its adapters from elsewhere."""
        await self._start()
        await self.adapters.adapt_shards(wanted)

    async def unload_adapter(self, name: str) -> str:
        """As `SharedAdapters.unload`."""
        await self._start()
        return await self.adapters.unload(name)

    async def adapter_list(self) -> AdapterList:
        """For an engine that starts. One that is being loaded is given to it when it has started."""
        await self._start()
        return self.adapters.current
