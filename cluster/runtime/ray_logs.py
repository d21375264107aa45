"""Sends an actor's log lines to Ray's log files. Imports no torch, for processes that need none."""

import logging
import sys

import ray

from cluster.logs import make_formatter
from cluster.runtime.ray_private.core import process_title


def log_to_ray() -> None:
    """Call it first in an actor's process."""
    # Ray has its own handlers on the root logger, and Serve makes a replica's sys.stderr a buffer of 1000 lines.
    handler = logging.StreamHandler(sys.__stderr__)
    title = process_title().removeprefix("ray::").partition(".")[0]
    handler.setFormatter(make_formatter(ray.get_runtime_context().get_actor_name() or title))
    ours = logging.getLogger("cluster")
    ours.handlers, ours.propagate = [handler], False
    ours.setLevel(logging.INFO)
