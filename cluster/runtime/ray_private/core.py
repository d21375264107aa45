"""Private names of Ray's core (2.60)."""

import logging
import math
import os
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import ray

# Their attributes are replaced while a Ray of ours starts: Ray has no setting for its processes' session, for a SIGTERM
# handler of ours, for its switch for clusters of desktop systems once ray is imported, for the script that starts a
# worker, for where it prints, nor for which processes a head has.
from ray._private import node, ray_constants, services, utils, worker

# Ray reads its token once a process; a token of ours comes and goes with our Ray.
from ray._private.authentication.authentication_token_setup import AuthenticationTokenLoader

from cluster.evolving import sent

C = TypeVar("C", bound=type)
log = logging.getLogger(__name__)

__all__ = [
    "AuthenticationTokenLoader",
    "actor_id",
    "by_name",
    "draining_nodes",
    "end_started",
    "gcs_channel",
    "left_addresses",
    "logs_folder",
    "node",
    "process_title",
    "ray_constants",
    "reports_to_log",
    "services",
    "session_folder",
    "started_processes",
    "utils",
    "worker",
]

DRAINING_TIMEOUT_S = 2.0  # for an answer of Ray's control service, which takes milliseconds


def by_name(cls: C) -> C:
    """An actor's class that Ray sends by its wire name. It would make a class of its own of it, and send that by value
    with the names of all methods: a process of a version that lacks one could not read it, and so call no actor of it.
    A class with this attribute Ray takes for one that it has made."""
    cls.__ray_actor_class__ = _Itself()  # type: ignore[attr-defined]
    return sent(cls)


class _Itself:
    """A class's attribute that is the class. (Ray disassembles all classes among the attributes, and those in them.)"""

    def __get__(self, instance: object, owner: type) -> type:
        return owner


def process_title() -> str:
    """The name that Ray shows of this process; `ray.get_runtime_context` has none for one without an actor's name."""
    title: str = ray._raylet.getproctitle()
    return title


def session_folder() -> Path:
    """The connected Ray's, on this node. The public context gives none to a process that Ray started."""
    return Path(worker.global_worker.node.get_session_dir_path())


def logs_folder() -> Path:
    """Of all of Ray's processes on this node, as `session_folder`."""
    return Path(worker.global_worker.node.get_logs_dir_path())


def started_processes() -> Mapping[str, Any]:
    """Ray's own processes by kind, each as a list of what has a `process`, where this one started them: Ray tells
    nobody of their end."""
    processes: Mapping[str, Any] = worker._global_node.all_processes
    return processes


def actor_id(handle: Any) -> str:
    """Another one when the actor is another one of the same name; a handle has no public word for it."""
    return str(handle._actor_id)


def draining_nodes() -> dict[str, float]:
    """The nodes that Ray drains, and until when each may stay, in seconds since 1970; infinity where nobody has told
    Ray. `ray.nodes` does not tell. Blocks. Raises RayError."""
    deadlines_ms = worker.global_worker.gcs_client.get_draining_nodes(timeout=DRAINING_TIMEOUT_S)
    return {node_id: at / 1000 if at else math.inf for node_id, at in deadlines_ms.items()}


def gcs_channel(address: str) -> Any:
    """A gRPC channel to a Ray's control service, with this process's token: Ray's own connecting waits two minutes."""
    from ray._private.grpc_utils import init_grpc_channel  # grpc loads with it

    return init_grpc_channel(address, options=[("grpc.enable_http_proxy", 0)])


def reports_to_log() -> Callable[[], None]:
    """From here on what Ray's processes report (a warning of too many workers, a dead raylet's last lines) goes to the
    log; Ray would print it on this process's standard output. Returns a function that undoes it."""
    before = worker.print_to_stdstream

    def note(message: Mapping[str, Any], *args: object, **kwargs: object) -> None:
        log.info("Ray: %s", "\n".join(message["lines"]))

    def undo() -> None:
        worker.print_to_stdstream = before

    worker.print_to_stdstream = note
    return undo


def end_started() -> None:
    """`ray.shutdown`, which ends the processes of a Ray that this process started, without the second that it gives
    each of them in turn (2.2 s in all): nothing of a Ray that ends is kept. The raylet's children end with it: they
    would see only later that it is gone, and the titles that Ray gives its agents hide whose they are."""
    here = worker._global_node
    if here is not None and here.all_processes:
        raylet, kill = started_processes()["raylet"][0].process, here.kill_all_processes

        def end(**how: bool) -> None:
            # Ray calls it again at this process's end, when the pid may be another process's.
            children = _children(raylet.pid) if raylet.poll() is None else []
            kill(**how | {"allow_graceful": False})
            for handle in children:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
                os.close(handle)

        here.kill_all_processes = end
    ray.shutdown()


def _children(pid: int) -> list[int]:
    """A handle of each child of a process."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # the thread has ended
            found += task.read_text().split()
    handles = []
    for child in found:
        with suppress(ProcessLookupError):
            handles.append(os.pidfd_open(int(child)))
    return handles


def left_addresses() -> list[str | None]:
    """Of Rays of this machine: the one started last, which may have ended, and all whose processes run.
    `ray.init("auto")` takes the first and asks no further."""
    try:
        left = utils.read_ray_address()
    except OSError:
        left = None
    return [left, *sorted(services.find_gcs_addresses())]
