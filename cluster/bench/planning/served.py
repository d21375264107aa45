"""Loads a served cluster and takes account: what clients saw, what engines and shards did, whose CPU time it took."""

import argparse
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.bench.machine import core_seconds, process_tree
from cluster.bench.traffic import TrafficResult, draw_prompts, run_load, summarize
from cluster.client.direct import read_url
from cluster.client.grpc_client import Client
from cluster.config import ClusterConfig
from cluster.errors import ClusterError, SetupError, Unavailable
from cluster.status import ClusterStatus

if TYPE_CHECKING:
    from cluster.runtime.operate import RunningCluster

READY_S = 60.0
CHANGE_S = 300.0  # for as many replicas to run as were asked for
SETTLE_S = 60.0
SETTLED_CORES = 0.35  # of what is in front, when nothing is asked: Ray and HAProxy alone take about 0.2
LOOK_S = 1.0
SECONDS = 1.0, 3600.0  # that a setting may take
TURNS = 3  # of a setting's streams at least
STEPS, CALLS = "moecluster_engine_step_seconds", "moecluster_shard_compute_seconds"
_LINE = re.compile(r"^(moecluster_\w+)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A cluster and a load. concurrency: streams at a time, of a closed loop.  rate: requests/s of an open one."""

    replicas: int
    shards: int
    prompt_tokens: int
    output_tokens: int
    num_requests: int
    concurrency: int = 0
    rate: float | None = None
    seed: int = 0

    @property
    def load(self) -> str:
        return f"{self.concurrency} at a time" if self.rate is None else f"{self.rate:.3g}/s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """took_s: from the first request to the last answer's end.  figures: by what the metrics' counters grew.
    core_s: seconds of CPU by role: engines, shards, client, and front for the rest."""

    setting: Setting
    traffic: TrafficResult
    took_s: float
    figures: dict[str, float]
    core_s: dict[str, float]

    @property
    def requests_s(self) -> float:
        return answered(self.traffic) / self.took_s

    @property
    def steps(self) -> float:
        return max(1.0, self.figures.get(f"{STEPS}_count", 0.0))

    @property
    def step_s(self) -> float:
        return self.figures.get(f"{STEPS}_sum", 0.0) / self.steps

    @property
    def rows(self) -> float:
        """Of a step."""
        return self.figures.get("moecluster_engine_step_tokens_total", 0.0) / self.steps


def check_seconds(seconds: float) -> None:
    """Raises SetupError for a --seconds that no setting may take."""
    if not SECONDS[0] <= seconds <= SECONDS[1]:
        raise SetupError(f"--seconds is {seconds:g}, {SECONDS[0]:g} to {SECONDS[1]:g} are possible")


def answered(traffic: TrafficResult) -> int:
    """Its requests that were neither refused nor failed."""
    return traffic.requests - traffic.failed - traffic.refused


class Bench:
    """A running cluster to be loaded. connect: makes a client of it.  root: the process whose descendants are the
    cluster's; None where they are on other machines, too."""

    def __init__(self, cluster: "RunningCluster", connect: Callable[[], Client], root: int | None) -> None:
        self.cluster = cluster
        self.connect = connect
        self.root = root

    @property
    def size(self) -> tuple[int, int]:
        """Attention replicas and expert shards."""
        return self.cluster.attention_replicas(), self.cluster.status().target_shards

    def scale(self, replicas: int, shards: int) -> None:
        """Blocks until they run and are at rest. Raises ClusterError."""
        if self.cluster.status().target_shards != shards and not self.cluster.status().dense:
            self.cluster.scale_experts(shards)
        self.cluster.scale_attention(replicas)  # whatever runs: another number may have been asked for
        deadline = time.monotonic() + CHANGE_S
        while self.cluster.attention_replicas() != replicas or self._num_engines() != replicas:
            if time.monotonic() > deadline:
                raise ClusterError(f"{replicas} attention replicas did not run within {CHANGE_S:g} s")
            time.sleep(LOOK_S)
        if self.root is not None:
            self.settle()

    def settle(self) -> float:
        """Waits until processes that have begun are through with it. Returns the cores that are busy then. Raises
        ClusterError."""
        deadline = time.monotonic() + SETTLE_S
        while True:
            before, started = self._core_s(self.cluster.status()), time.monotonic()
            time.sleep(2 * LOOK_S)
            after = self._core_s(self.cluster.status())
            cores = sum(after.values()) - sum(before.values())
            cores /= time.monotonic() - started
            if cores < SETTLED_CORES:
                return cores
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"the idle cluster kept {cores:.2f} cores busy for {SETTLE_S:g} s, {SETTLED_CORES:g} are usual: "
                    "measure again"
                )

    def load(self, setting: Setting, begin: Callable[[], None] = lambda: None) -> tuple[TrafficResult, float]:
        """Returns what clients saw, and the seconds of all. begin: called before the first request. Raises ClusterError
        where a request fails."""
        args = argparse.Namespace(
            seed=setting.seed, sampling="greedy", concurrency=setting.concurrency, rate=setting.rate,
            requests=setting.num_requests, prompt_tokens=setting.prompt_tokens, output_tokens=setting.output_tokens,
        )  # fmt: skip
        with self.connect() as client:
            if not client.is_serving(READY_S):
                raise Unavailable(f"the server is not ready after {READY_S:g} s")
            prompts = draw_prompts(args, client.model_info().vocab_size, setting.num_requests)
            begin()
            started = time.perf_counter()
            timings = run_load(client.stream, args, prompts, lambda: None)
            took_s = time.perf_counter() - started
        traffic = summarize(timings, took_s)
        if traffic.failed:
            raise ClusterError(f"{traffic.failed} of {traffic.requests} requests failed: {traffic.errors[0]}")
        return traffic, took_s

    def run(self, setting: Setting) -> Measured:
        """Raises ClusterError where a request fails."""
        status = self.cluster.status()
        figures: dict[str, float] = {}
        core_s: dict[str, float] = {}

        def begin() -> None:
            figures.update(read_figures(status))
            core_s.update(self._core_s(status))

        traffic, took_s = self.load(setting, begin)
        grown = {name: value - figures.get(name, 0.0) for name, value in read_figures(status).items()}
        used = {role: seconds - core_s[role] for role, seconds in self._core_s(status).items()}
        return Measured(setting=setting, traffic=traffic, took_s=took_s, figures=grown, core_s=used)

    def _num_engines(self) -> int:
        return sum(part.role == "replica" for part in self.cluster.parts())

    def _core_s(self, status: ClusterStatus) -> dict[str, float]:
        engines = {replica.process.pid for replica in status.replicas if replica.engine}
        shards = {shard.process.pid for shard in status.shards if shard.process is not None}
        assert self.root is not None, "its processes are all here"
        seconds = {pid: core_seconds(pid) for pid in process_tree(self.root)}
        found = {
            "engines": sum(seconds.get(pid, 0.0) for pid in engines),
            "shards": sum(seconds.get(pid, 0.0) for pid in shards),
            "client": seconds.get(os.getpid(), 0.0),
        }
        return {**found, "front": sum(seconds.values()) - sum(found.values())}


def read_figures(status: ClusterStatus) -> dict[str, float]:
    """The sums of all processes' metrics by name."""
    found: dict[str, float] = {}
    for address in status.metrics_addresses:
        for name, value in _LINE.findall(read_url(address, timeout_s=10.0)):
            if not name.endswith("_bucket"):
                found[name] = found.get(name, 0.0) + float(value)
    return found


@contextmanager
def serve_here(model_dir: Path, kv_cache_bytes: int, say: Callable[[str], None]) -> Iterator[Bench]:
    """Serves a checkpoint on this machine, each process on one thread. Raises SetupError."""
    from cluster.runtime.operate import RunningCluster
    from cluster.runtime.start.served import ServedCluster, ServeOptions  # Ray loads with them

    say("starting a cluster")
    served = ServedCluster(
        ClusterConfig(
            model=str(model_dir), kv_cache_bytes=kv_cache_bytes, expert_shards=1, ingress_replicas=1, metrics_port=0,
            cpus_per_attention_replica=1, cpus_per_expert_shard=1,
        ),
        ServeOptions(grpc_port=0),
    )  # fmt: skip
    try:
        with RunningCluster() as running:
            address = f"127.0.0.1:{served.grpc_port}"
            yield Bench(running, lambda: Client(address, patience_s=None), os.getpid())
    finally:
        say("ending the cluster")
        served.close()
