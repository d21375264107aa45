"""Runs one system in a process of its own: its memory is given back, its threads disturb no other.

The child reports over a pipe: ("loaded", detail, seconds), ("run", batch) after each run, then ("done",
points) or ("failed", message).
"""

import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from cluster.bench.systems import SystemSpec, build_system
from cluster.bench.throughput import Point, System, Workload, measure
from cluster.config import ModelConfig
from cluster.errors import ClusterError

log = logging.getLogger(__name__)

_STOP_S = 30.0  # for a child to end by itself, Ray included

Build = Callable[[SystemSpec, ModelConfig, Workload], System]


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemResult:
    """One system's figures. load_s: from nothing to ready."""

    name: str
    detail: str
    load_s: float
    points: tuple[Point, ...]


def run_system(
    spec: SystemSpec,
    config: ModelConfig,
    workload: Workload,
    on_progress: Callable[[str], None],
    build: Build = build_system,
) -> SystemResult:
    """Measures one system in a fresh process and blocks until it has ended.

    on_progress: called with a line once when the system is loaded, then after each run.
    Raises ClusterError with the child's message, or with its exit code when it was killed.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child_main, args=(sender, build, spec, config, workload))
    with _environment(spec.environment):
        child.start()
    sender.close()
    detail, load_s = "", 0.0
    try:
        while True:
            message = receiver.recv()
            match message:
                case ("loaded", str(detail), float(load_s)):
                    on_progress("loaded")
                case ("run", int(batch)):
                    on_progress(f"batch {batch}")
                case ("done", tuple(points)):
                    return SystemResult(name=spec.name, detail=detail, load_s=load_s, points=points)
                case ("failed", str(text)):
                    raise ClusterError(f"{spec.name}: {text}")
    except EOFError as error:
        child.join(_STOP_S)
        raise ClusterError(
            f"{spec.name}: its process ended with code {child.exitcode} before it had measured anything"
            + (": most likely there was too little memory" if child.exitcode == -9 else "")
        ) from error
    finally:
        receiver.close()
        child.join(_STOP_S)
        if child.is_alive():
            child.terminate()
            child.join()


def _child_main(sender: Connection, build: Build, spec: SystemSpec, config: ModelConfig, workload: Workload) -> None:
    os.dup2(2, 1)  # what libraries print must not get into the table
    try:
        points = _measure_system(sender, build, spec, config, workload)
    except ClusterError as error:
        sender.send(("failed", str(error)))
    except Exception as error:
        log.exception("%s failed", spec.name)
        sender.send(("failed", f"{type(error).__name__}: {error}"))
    else:
        sender.send(("done", points))


def _measure_system(
    sender: "Connection[Any, Any]", build: Build, spec: SystemSpec, config: ModelConfig, workload: Workload
) -> tuple[Point, ...]:
    started = time.perf_counter()
    system = build(spec, config, workload)
    try:
        sender.send(("loaded", system.detail, time.perf_counter() - started))
        return measure(system, workload, time.perf_counter, lambda batch: sender.send(("run", batch)))
    finally:
        system.close()


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets variables for processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
