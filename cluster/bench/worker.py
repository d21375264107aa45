"""Runs a system in a process of its own, so that it gives back its memory and its threads disturb no other.

The child sends ("loaded", detail, seconds), then answers each (prompts, num_tokens, sampling) with ("done", tokens of
each prompt) until it is sent None; ("failed", message) ends it.
"""

import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from cluster.bench.sampling import GREEDY, Sampling
from cluster.bench.spec import SystemSpec
from cluster.bench.systems import build_system
from cluster.bench.throughput import Point, Prompts, System, Workload, measure
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


class RemoteSystem:
    """A system in a fresh process. load_s: from nothing to ready.

    Each method raises ClusterError with the child's message, or with its exit code if it was killed. Neither names the
    system.
    """

    def __init__(self, spec: SystemSpec, config: ModelConfig, workload: Workload, build: Build = build_system) -> None:
        self.name = spec.name
        context = multiprocessing.get_context("spawn")
        self._pipe, childs_end = context.Pipe()
        self._child = context.Process(target=_child_main, args=(childs_end, build, spec, config, workload))
        with _environment(spec.environment):
            self._child.start()
        childs_end.close()
        try:
            self.detail, self.load_s = self._answer()
        except BaseException:
            self.close()
            raise

    def generate(self, prompts: Prompts, num_tokens: int, sampling: Sampling = GREEDY) -> list[int]:
        self._pipe.send((prompts, num_tokens, sampling))
        [counts] = self._answer()
        return list(counts)

    def close(self) -> None:
        """Blocks until the child has ended, by force if need be."""
        with suppress(OSError):
            self._pipe.send(None)
        self._pipe.close()
        self._child.join(_STOP_S)
        if self._child.is_alive():
            self._child.terminate()
            self._child.join()

    def _answer(self) -> list[Any]:
        try:
            message: tuple[Any, ...] = self._pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            self._child.join(_STOP_S)
            code = self._child.exitcode
            raise ClusterError(
                f"its process ended with code {code} before it had measured anything"
                + (": most likely there was too little memory" if code == -9 else "")
            ) from error
        kind, *values = message
        if kind == "failed":
            raise ClusterError(values[0])
        return values


def run_system(
    spec: SystemSpec,
    config: ModelConfig,
    workload: Workload,
    on_progress: Callable[[str], None],
    build: Build = build_system,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> SystemResult:
    """Measures one system in a fresh process and blocks until it has ended.

    on_progress: called with a line once when the system is loaded, then after each run.
    Raises ClusterError that names the system.
    """
    try:
        with closing(RemoteSystem(spec, config, workload, build)) as system:
            on_progress("loaded")
            points = measure(system, workload, clock, lambda run: on_progress(run.name))
    except ClusterError as error:
        raise ClusterError(f"{spec.name}: {error}") from error
    return SystemResult(name=spec.name, detail=system.detail, load_s=system.load_s, points=points)


def _child_main(
    pipe: "Connection[Any, Any]", build: Build, spec: SystemSpec, config: ModelConfig, workload: Workload
) -> None:
    os.dup2(2, 1)  # libraries' prints must not get into the table
    try:
        _serve_runs(pipe, build, spec, config, workload)
    except ClusterError as error:
        pipe.send(("failed", str(error)))
    except Exception as error:
        log.exception("%s failed", spec.name)
        pipe.send(("failed", f"{type(error).__name__}: {error}"))


def _serve_runs(
    pipe: "Connection[Any, Any]", build: Build, spec: SystemSpec, config: ModelConfig, workload: Workload
) -> None:
    started = time.perf_counter()
    system = build(spec, config, workload)
    try:
        pipe.send(("loaded", system.detail, time.perf_counter() - started))
        while (task := _next_task(pipe)) is not None:
            pipe.send(("done", system.generate(*task)))
    finally:
        system.close()


def _next_task(pipe: "Connection[Any, Any]") -> tuple[Prompts, int, Sampling] | None:
    """None if no more tasks come."""
    try:
        task: tuple[Prompts, int, Sampling] | None = pipe.recv()
    except EOFError:
        return None
    return task


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets variables for processes that start meanwhile."""
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
