"""Starts of Ray where it has no setting: its processes, the script of its workers, the patience with its raylet."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.errors import SetupError
from cluster.runtime.ray_private.core import node, ray_constants, services
from cluster.runtime.start import setup_worker

RAYLET_START_S = 60.0


class NoRaylet(SetupError):
    """The raylet of a Ray that starts ended, or did not come. Another start may succeed."""


@contextmanager
def quick_workers() -> Iterator[None]:
    """A Ray that starts meanwhile starts its workers by our `setup_worker.py`. Ray has no setting for it."""
    before = ray_constants.SETUP_WORKER_FILENAME
    ray_constants.SETUP_WORKER_FILENAME = setup_worker.__file__  # an absolute path stays one when it is joined
    try:
        yield
    finally:
        ray_constants.SETUP_WORKER_FILENAME = before


@contextmanager
def few_processes() -> Iterator[None]:
    """A Ray that starts meanwhile has no autoscaler, no dashboard and no reader of logs: there are no nodes to add, the
    dashboard would show nothing, and nobody listens to the reader. They took 4 of a start's 26 s of CPU, a twentieth
    of what an idle cluster takes, and 300 MB. Ray has no setting for it."""
    unwanted = ("start_monitor", "start_api_server", "start_log_monitor")
    before = {name: getattr(node.Node, name) for name in unwanted}
    for name in unwanted:
        setattr(node.Node, name, lambda self, **how: None)
    try:
        yield
    finally:
        for name, start in before.items():
            setattr(node.Node, name, start)


@contextmanager
def patient(session_folder: Path) -> Iterator[None]:
    """A Ray that starts meanwhile has RAYLET_START_S for its raylet. Ray (2.60) gives up after 30 s, without a setting
    for it: on a machine that is busy with other work they passed. It also waits for one that has ended. Raises
    NoRaylet.

    session_folder: where the sessions of this Ray lie.
    """
    before, start_before = services.get_node, services.start_raylet
    raylets: list[subprocess.Popen[bytes]] = []

    def start_raylet(*arguments: Any, **options: Any) -> Any:
        started = start_before(*arguments, **options)
        raylets.append(started.process)
        return started

    def get_node(*arguments: Any) -> Any:
        deadline = time.monotonic() + RAYLET_START_S
        while True:
            try:
                return before(*arguments)
            except RuntimeError:  # it is not registered yet
                has_ended = any(raylet.poll() is not None for raylet in raylets)
                if has_ended or time.monotonic() > deadline:
                    what = "ended" if has_ended else f"is not there after {RAYLET_START_S:.0f} s"
                    raise NoRaylet(f"Ray did not start: its raylet {what}{_last_words(session_folder)}") from None
            time.sleep(0.1)

    services.get_node, services.start_raylet = get_node, start_raylet
    try:
        yield
    finally:
        services.get_node, services.start_raylet = before, start_before


def _last_words(session_folder: Path) -> str:
    """A colon and the last line of its files; nothing where they are empty."""
    for path in sorted(session_folder.glob("session_latest/logs/raylet.*"), key=lambda path: path.name != "raylet.err"):
        lines = path.read_text(errors="replace").split("\n")
        if words := next((line.strip() for line in reversed(lines) if line.strip()), ""):
            return f": {words}"
    return ""
