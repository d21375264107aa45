"""One engine's knowledge of the shards: the current plan and an actor for each, kept up to date by a thread.

The thread asks the controller for the next plan and waits there; its asking is also the lease that keeps the shards
alive: a controller that nobody asks any more takes them down. When the controller is away, the last plan stays.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray

from cluster.config import ClusterConfig
from cluster.config.lora import AdapterList
from cluster.errors import SetupError, ShardUnavailable, Unavailable
from cluster.experts.placement import PlacementPlan
from cluster.runtime.workers.protocol import LONG_POLL_S, Membership
from cluster.status import ProcessInfo

log = logging.getLogger(__name__)

CLOSE_INTERVAL_S = 0.5  # between two looks whether a directory that waits for news was closed


def take_slot(controller: Any, holder: str, process: ProcessInfo, engine: Any) -> ProcessInfo:
    """The process with the slot that the controller gives this engine; none from one of an older version, which gives
    none. Waits while the controller is away."""
    while hasattr(controller, "slot"):
        try:
            return replace(process, slot=ray.get(controller.slot.remote(holder, process, engine)))
        except ray.exceptions.RayActorError as error:
            log.warning("the expert controller is away, %s waits for its slot: %s", holder, error)
            time.sleep(1.0)
    return process


def adapter_list(controller: Any, config: ClusterConfig) -> AdapterList:
    """The adapters that an engine shall have: the configuration's, where the controller is of a version that knows of
    none. Waits while the controller is away."""
    while True:
        try:
            if ray.get(controller.status.remote()).adapters_version < 0:
                return AdapterList.configured(config.lora_adapters)
            found: AdapterList = ray.get(controller.adapter_list.remote())
            return found
        except ray.exceptions.RayActorError as error:
            log.warning("the expert controller is away, an engine waits for its adapters: %s", error)
            time.sleep(1.0)


class ShardDirectory:
    """A `PlanSource` and a `ShardHandles`. All methods may be called from any thread."""

    def __init__(
        self,
        controller: Any,
        holder: str,
        process: ProcessInfo,
        engine: Any | None,
        on_epoch: Callable[[int], None] = lambda epoch: None,
    ) -> None:
        """on_epoch: called with the epoch of each new plan, by the thread."""
        self._controller = controller
        self._holder = holder
        self._process = process
        self._engine = engine
        self._on_epoch = on_epoch
        self._news = threading.Condition()
        self._membership: Membership | None = None
        self._failure: SetupError | Unavailable | None = None
        self._lost = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="shard-directory", daemon=True)
        self._thread.start()

    def wait_ready(self, timeout_s: float | None = None) -> bool:
        """Blocks until all shards have loaded; false after the timeout. Raises the SetupError that they cannot load
        for, Unavailable when their Ray is lost."""
        with self._news:
            ready = self._news.wait_for(lambda: self._membership is not None or self._failure is not None, timeout_s)
            if self._failure is not None:
                raise self._failure
            return ready

    def current(self) -> PlacementPlan:
        return self._current().plan

    def wait_beyond(self, epoch: int, timeout_s: float) -> bool:
        with self._news:
            return self._news.wait_for(lambda: self._current().plan.epoch > epoch, timeout_s)

    def handle(self, shard_id: int) -> Any:
        handle = self._current().handles.get(shard_id)
        if handle is None:
            raise ShardUnavailable(f"shard {shard_id} is being replaced", shard_id)
        return handle

    def takes_traces(self, shard_id: int) -> bool:
        return shard_id in self._current().take_traces

    def close(self) -> None:
        """Ends the lease; the thread goes with its next answer."""
        self._closed.set()

    def join(self, timeout_s: float) -> None:
        """Waits for the thread of a closed directory: Ray must not be shut down under its call."""
        self._thread.join(timeout_s)

    def lose(self, reason: str) -> None:
        """The Ray of the shards has died: there will be no plan any more. May be called from any thread."""
        with self._news:
            self._failure, self._lost = Unavailable(reason), True
            self._closed.set()
            self._news.notify_all()

    def _current(self) -> Membership:
        if self._lost and self._failure is not None:
            raise self._failure
        if self._membership is None:
            raise Unavailable("the expert shards are not ready yet")
        return self._membership

    def _watch(self) -> None:
        while not self._closed.is_set():
            known = self._membership.plan.epoch if self._membership else 0
            try:
                membership = self._ask(known)
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
                if self._closed.is_set():
                    return
                log.warning("the expert controller is away, the last plan (epoch %d) stays: %s", known, error)
                time.sleep(1.0)  # between two tries to reach a controller that Ray is restarting
                continue
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, SetupError):
                    with self._news:
                        self._failure = error.cause
                        self._news.notify_all()
                    return
                log.error("the expert controller failed, the last plan (epoch %d) stays: %s", known, error)
                time.sleep(1.0)
                continue
            if membership is not None:
                with self._news:
                    self._membership = membership
                    self._news.notify_all()
                self._on_epoch(membership.plan.epoch)

    def _ask(self, known: int) -> Membership | None:
        """The next plan, None for no news. Comes back soon when this is closed: Ray may be shut down then."""
        answer = self._controller.wait_plan.remote(self._holder, self._process, self._engine, known)
        deadline = time.monotonic() + 2 * LONG_POLL_S
        while not ray.wait([answer], timeout=CLOSE_INTERVAL_S)[0]:
            if self._closed.is_set():
                return None
            if time.monotonic() > deadline:
                raise ray.exceptions.GetTimeoutError(f"no answer in {2 * LONG_POLL_S:g} s")
        membership: Membership | None = ray.get(answer)
        return membership
