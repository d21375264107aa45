"""A Ray of this machine alone: on loopback, with a token of its own, in a directory of its own.

Ray (2.60) replaces 127.0.0.1 by the address that other hosts see, unless its switch for clusters of desktop systems is
off: then the node is 127.0.0.1, and Ray's gRPC servers listen there instead of on all interfaces. Ray would write its
token into the user's home, readable for everybody; ours is in its processes' environment only.
"""

import logging
import os
import secrets
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import ray

from cluster.config.resources import available_cpus
from cluster.errors import ClusterError, SetupError
from cluster.footprint.folders import OwnedFolder, clean
from cluster.footprint.keeper import start_keeper
from cluster.footprint.processes import MARK
from cluster.private import private_files
from cluster.runtime.bounds import RAY_BOUNDS
from cluster.runtime.front.haproxy import set_environment
from cluster.runtime.names import NAMESPACE, RAY_FOLDER
from cluster.runtime.ray_private.core import (
    AuthenticationTokenLoader,
    end_started,
    ray_constants,
    reports_to_log,
)
from cluster.runtime.start.ray_address import check_address
from cluster.runtime.start.ray_processes import RayWatch, apart
from cluster.runtime.start.ray_start import NoRaylet, few_processes, patient, quick_workers

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 256 << 20  # batches only pass through
ROOM_TO_GROW_CPUS = 64  # logical ones: `moe-cluster scale` adds processes later
# Metrics of Ray's autoscaler and dashboard, which everybody on the machine could read. With a port that does not
# exist, they log an error at their start and serve none.
NO_METRICS_PORTS = {"AUTOSCALER_METRIC_PORT": "-1", "DASHBOARD_METRIC_PORT": "-1"}
# A raylet that finds one of its ports taken ends, and once in some hundred starts on a busy machine one did not come.
STARTS = 3
AUTH_MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectedRay:
    """stop: ends the Ray, unless it ran before or this process still uses it elsewhere.
    environment: of another process of this user that is to reach it."""

    stop: Callable[[], None]
    environment: Mapping[str, str] = field(default_factory=dict)


def start_ray(
    *,
    num_cpus: float,
    address: str | None = None,
    environment: Callable[[Path], Mapping[str, str]] = lambda directory: {},
    on_lost: Callable[[str], None] = lambda reason: None,
) -> ConnectedRay:
    """Connects to a Ray cluster, or starts one of this machine, or shares the one that this process has started.

    num_cpus: Ray's logical ones, so that the processes find room whatever the machine has.
    environment: from the directory of the Ray that starts, the environment of its processes.
    on_lost: a thread calls it, with the reason, when a Ray that started here has died by itself and all its processes
        have ended.
    """
    with _Process.lock:
        if ray.is_initialized():
            if _Process.started is None:
                return ConnectedRay(stop=lambda: None)
        elif address:
            check_address(address)
            ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
            return ConnectedRay(stop=lambda: ray.shutdown(), environment=_from_environment(AUTH_MODE))
        else:
            if _Process.started is not None:  # other code of this process has called ray.shutdown
                _Process.started.stop()
            _Process.started = _started(num_cpus, environment)
        started = _Process.started
        started.users.append(on_lost)

    def stop() -> None:
        with _Process.lock:
            if on_lost in started.users:
                started.users.remove(on_lost)
            if not started.users:
                started.stop()
                if _Process.started is started:
                    _Process.started = None

    return ConnectedRay(
        stop=stop, environment={**_from_environment(AUTH_MODE, TOKEN), ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}
    )


class _Process:
    """The Ray that this process has started: a process has one, as it has one connection to Ray."""

    lock = threading.RLock()
    started: "LocalRay | None" = None


def _started(num_cpus: float, environment: Callable[[Path], Mapping[str, str]]) -> "LocalRay":
    for _ in range(STARTS - 1):
        try:
            return LocalRay(num_cpus, environment)
        except NoRaylet as error:
            log.warning("%s: starting another", error)
    return LocalRay(num_cpus, environment)


class LocalRay:
    """A Ray that this process started, its folder, and the keeper, which removes both if this process is killed."""

    def __init__(self, num_cpus: float, environment: Callable[[Path], Mapping[str, str]]) -> None:
        """Raises SetupError."""
        clean()
        self.users: list[Callable[[str], None]] = []  # each user's on_lost
        self._stopped = False
        self._watch: RayWatch | None = None
        self._forget_token: Callable[[], None] = lambda: None
        self._print_reports: Callable[[], None] = lambda: None
        self._folder = OwnedFolder()
        self._keeper: subprocess.Popen[bytes] = start_keeper(self._folder)
        try:
            self._start(num_cpus, environment)
        except BaseException as error:
            self.stop()
            if isinstance(error, ClusterError) or not isinstance(error, Exception):
                raise
            reason = (str(error) or repr(error)).splitlines()[0]
            raise SetupError(f"Ray did not start: {reason}") from error

    def stop(self) -> None:
        """Ends it and removes its folder. Safe to call again."""
        if self._stopped:
            return
        self._stopped = True
        if self._watch is not None:
            self._watch.stop()
        try:
            end_started()
        finally:
            self._remove()

    def _start(self, num_cpus: float, environment: Callable[[Path], Mapping[str, str]]) -> None:
        folder = self._folder.path
        self._forget_token = _make_token()
        with (
            set_environment({**RAY_BOUNDS, **environment(folder)}),
            _marked(folder),
            loopback(),
            private_files(),
            apart(),
            quick_workers(),
            few_processes(),
            patient(folder / RAY_FOLDER),
        ):
            ray.init(
                address="local",
                num_cpus=max(available_cpus(), int(num_cpus + 1)) + ROOM_TO_GROW_CPUS,
                namespace=NAMESPACE,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(folder / RAY_FOLDER),
                _node_ip_address="127.0.0.1",
                # Ray would start a worker for each logical CPU; our actors have their own environments and use none.
                # Nobody needs its metrics, and everybody on this machine could read them at a port.
                _system_config={"prestart_worker_first_driver": False, "enable_metrics_collection": False},
            )
        self._print_reports = reports_to_log()
        self._watch = RayWatch(self._lost)

    def _lost(self, reason: str) -> None:
        """Ends the rest of Ray: some of its processes would stay for ever, and clients would wait for a minute."""
        self._folder.remove()
        for on_lost in list(self.users):
            on_lost(reason)

    def _remove(self) -> None:
        self._forget_token()
        self._print_reports()
        self._folder.remove()
        self._keeper.kill()
        self._keeper.wait()


@contextmanager
def _marked(folder: Path) -> Iterator[None]:
    """Processes that start meanwhile belong to this folder, and to no other one."""
    before = os.environ.get(MARK)
    os.environ[MARK] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[MARK]
        else:
            os.environ[MARK] = before


def _from_environment(*names: str) -> dict[str, str]:
    return {name: os.environ[name] for name in names if name in os.environ}


def _make_token() -> Callable[[], None]:
    """Sets a new token for Ray, unless the user has set a token or a mode; returns a function that removes it."""
    if os.environ.get(AUTH_MODE, "token") != "token" or TOKEN in os.environ or TOKEN_PATH in os.environ:
        return lambda: None
    os.environ[TOKEN] = secrets.token_hex(32)
    AuthenticationTokenLoader.instance().reset_cache()

    def forget() -> None:
        os.environ.pop(TOKEN, None)
        AuthenticationTokenLoader.instance().reset_cache()

    return forget


@contextmanager
def loopback() -> Iterator[None]:
    """Sets the switch for processes that start meanwhile, and for this one, which has read it already."""
    with set_environment({ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0", **NO_METRICS_PORTS}):
        before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
        try:
            yield
        finally:
            ray_constants.ENABLE_RAY_CLUSTER = before
