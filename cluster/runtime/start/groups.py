"""For the process that starts and stops a group of shards: finds its controller, reports its status, ends it."""

import logging
import shutil
import threading
from collections.abc import Callable
from typing import Any

import ray

from cluster.runtime.names import NAMESPACE, controller_name
from cluster.runtime.process import metrics_dir
from cluster.status import ClusterStatus

log = logging.getLogger(__name__)

STATUS_TIMEOUT_S = 5.0
STOP_TIMEOUT_S = 30.0

OnStatus = Callable[[ClusterStatus], None]


class StatusReports:
    """While open, a thread hands the controller's status to a callback twice a second."""

    def __init__(self, group: str, on_status: OnStatus | None) -> None:
        self._name = controller_name(group)
        self._on_status = on_status
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="status", daemon=True)

    def __enter__(self) -> None:
        if self._on_status is not None:
            self._thread.start()

    def __exit__(self, *exc_info: object) -> None:
        self._done.set()
        if self._on_status is not None:
            self._thread.join()

    def _run(self) -> None:
        assert self._on_status is not None
        while not self._done.wait(0.5):
            controller = find_actor(self._name)
            if controller is None:
                continue
            try:
                self._on_status(ray.get(controller.status.remote(), timeout=STATUS_TIMEOUT_S))
            except ray.exceptions.RayError as error:
                log.debug("no status: %s", error)


def close_controller(controller: Any, group: str) -> None:
    """Ends a group's shards and its controller, and removes their files on this machine."""
    try:
        ray.get(controller.close.remote(), timeout=STOP_TIMEOUT_S)
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
        log.warning("%s: the controller did not close: %s", group, error)
    ray.kill(controller)
    shutil.rmtree(metrics_dir(group), ignore_errors=True)


def find_actor(name: str) -> Any | None:
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None
