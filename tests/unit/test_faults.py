"""A fault tells which process it ended, and is over when that one is missed and all others are there."""

import random
import signal

import pytest
import ray
from ray.serve.exceptions import RayServeException

from cluster.chaos import faults
from cluster.chaos.faults import inject, wait_whole
from cluster.errors import ClusterError
from cluster.runtime.operate import Part, _in_one_line
from cluster.runtime.workers.rehearsal import SLOW_S, Rehearsal
from cluster.status import ClusterStatus, ProcessInfo, ReplicaStatus, ShardStatus
from cluster.types import EngineStats

STATS = EngineStats(running=0, waiting=0, used_blocks=0, num_blocks=1, generated_tokens=0, at=0.0)


def process(pid):
    return ProcessInfo(pid=pid, node_id="n", gpu_ids=())


class FakeCluster:
    """A shard and a replica. A killed process is seen for `blind` more looks; then its successor is there."""

    first_shards = 1

    def __init__(self, blind=2):
        self.pids, self.blind, self.killed, self.looks, self.signals = {"shard": 7, "replica": 77}, blind, "", 0, []

    def parts(self):
        return [Part(role=role, name=role, process=process(pid)) for role, pid in self.pids.items()]

    def status(self):
        if self.killed:
            self.looks += 1
            if self.looks > self.blind:
                self.pids[self.killed] += 1000
                self.killed = ""
        replica = ReplicaStatus(name="r", process=process(self.pids["replica"]), engine=None, asked_at=0.0, stats=STATS)
        return ClusterStatus(
            epoch=1, shards=(ShardStatus(shard_id=0, state="up", process=process(self.pids["shard"])),),
            replicas=(replica,), metrics_addresses=(), draining=False, published=True, target_shards=1,
        )  # fmt: skip

    def send_signal(self, process, number):
        self.signals.append((process.pid, number))
        if number in (signal.SIGKILL, signal.SIGTERM):
            [self.killed] = [role for role, pid in self.pids.items() if pid == process.pid]

    def rebalance(self):
        return "moved to shard 0 (7)"


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(faults, "_WHOLE_POLL_S", 0.0)
    monkeypatch.setattr(faults, "_STOPPED_S", (0.0, 0.0))


@pytest.mark.parametrize(
    ("kind", "role", "number"),
    [("kill-shard", "shard", signal.SIGKILL), ("end-replica", "replica", signal.SIGTERM)],
)
def test_a_killed_process_is_waited_for_until_it_is_missed(kind, role, number):
    """Its successor is seen at the third look; until then the status shows it as if nothing had been."""
    cluster = FakeCluster()
    pid = cluster.pids[role]
    recovery = inject(kind, cluster, random.Random(0), 1, 10.0)
    assert cluster.signals == [(pid, number)]
    assert (cluster.looks, cluster.pids[role]) == (3, pid + 1000)
    assert recovery.what == f"{number.name} to {role} ({pid})"


@pytest.mark.parametrize("kind", ["stop-shard", "rebalance"])
def test_a_fault_that_ends_no_process_waits_for_none(kind):
    """Though its words name the process by its id."""
    cluster = FakeCluster()
    assert "(7)" in inject(kind, cluster, random.Random(0), 1, 10.0).what
    assert cluster.looks == 0


def test_a_process_that_nobody_misses_is_no_recovery():
    with pytest.raises(ClusterError, match=r"not whole again after 0\.05 s: 1 of 1 attention replicas"):
        wait_whole(FakeCluster(), 1, 0.05, killed=process(7))


class Fronts(FakeCluster):
    """Two ingresses, and a HAProxy on each of two nodes. Serve counts a killed ingress for `blind` more looks."""

    def __init__(self, blind=2):
        super().__init__(blind)
        self.running = {("ingress", "a", 1), ("ingress", "b", 2), ("haproxy", "a", 3), ("haproxy", "b", 4)}
        self.gone = None

    def fronts(self):
        if self.gone is not None:
            self.looks += 1
            if self.looks > self.blind:
                self.running.add((*self.gone[:2], self.gone[2] + 1000))
                self.gone = None
        return [
            Part(role=role, name=role, process=ProcessInfo(pid=pid, node_id=node, gpu_ids=()))
            for role, node, pid in sorted(self.running)
        ]

    def ready_ingresses(self):
        return 2

    def send_signal(self, process, number):
        self.signals.append((process.pid, number))
        [self.gone] = [front for front in self.running if front[2] == process.pid]
        self.running.remove(self.gone)


@pytest.mark.parametrize(("kind", "pids"), [("kill-ingress", {1, 2}), ("kill-haproxy", {3, 4})])
def test_a_killed_front_is_waited_for_on_its_node(kind, pids):
    cluster = Fronts()
    recovery = inject(kind, cluster, random.Random(0), 1, 10.0)
    [(pid, number)] = cluster.signals
    assert (pid in pids, number, cluster.looks) == (True, signal.SIGKILL, 3)
    assert recovery.what == f"SIGKILL to {kind.removeprefix('kill-')} ({pid})"


def test_a_front_that_nobody_makes_again_is_no_recovery():
    with pytest.raises(ClusterError, match=r"not whole again after 0\.05 s: 1 of 2 ingresses, HAProxy on 2 of 2 nodes"):
        inject("kill-ingress", Fronts(blind=10**9), random.Random(0), 1, 0.05)


class Restarting(Fronts):
    """Its controller, and then Serve, answer no questions for some looks; `deaf` is how many."""

    def __init__(self, deaf):
        super().__init__(blind=0)
        self.deaf = deaf

    def fronts(self):
        found = super().fronts()
        if self.signals and self.deaf:
            self.deaf -= 1
            raise ClusterError("the expert controller is being restarted")
        return found

    def ready_ingresses(self):
        if self.deaf:
            raise ClusterError("Serve does not tell")
        return super().ready_ingresses()


def test_a_front_is_waited_for_while_nobody_can_say_how_it_is():
    assert inject("kill-ingress", Restarting(deaf=3), random.Random(0), 1, 10.0).kind == "kill-ingress"
    with pytest.raises(ClusterError, match=r"not whole again after 0\.05 s: the expert controller is being restarted"):
        inject("kill-ingress", Restarting(deaf=10**9), random.Random(0), 1, 0.05)


def test_the_front_has_the_time_that_the_rest_has_left(monkeypatch):
    """Of 10 s the shards and replicas take 9: the front gets 1, whatever is missing."""
    now = [0.0]
    monkeypatch.setattr(faults.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(faults.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + 0.1))
    monkeypatch.setattr(faults, "wait_whole", lambda *args, **given: now.__setitem__(0, 9.0))
    with pytest.raises(ClusterError, match="after 10 s"):
        inject("kill-ingress", Fronts(blind=10**9), random.Random(0), 1, 10.0)
    assert now[0] < 10.5


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ray.exceptions.RayActorError(error_msg="the actor\nis gone"), "it failed: the actor"),
        (ray.exceptions.GetTimeoutError("late"), "it failed: late"),
        (ray.exceptions.RayTaskError("f", "Traceback\nof many lines", OSError("no /proc")), "it failed: no /proc"),
        (RayServeException("no Serve\nruns"), "it failed: no Serve"),
    ],
)
def test_rays_errors_are_one_line(error, words):
    with pytest.raises(ClusterError) as failure, _in_one_line("it failed"):
        raise error
    assert str(failure.value) == words


class Streams:
    def __init__(self):
        self.calls = []

    def cut(self):
        self.calls.append("cut")

    def damage(self):
        self.calls.append("damage")


def test_a_rehearsal_shows_each_fault_for_as_long_as_it_is_asked_to():
    now, slept, streams = [0.0], [], Streams()
    rehearsal = Rehearsal(clock=lambda: now[0], sleep=slept.append)
    rehearsal.before_load()
    rehearsal.before_product()
    for what in ("cut", "damage", "slow", "no memory"):
        rehearsal.begin(what, 3.0, streams)
    assert streams.calls == ["cut", "damage"]
    for at in (1.0, 2.9, 3.1):
        now[0] = at
        rehearsal.before_product()
    assert slept == [SLOW_S, SLOW_S]
    with pytest.raises(MemoryError, match="as a rehearsal"):
        rehearsal.before_load()
    rehearsal.before_load()


def test_a_shard_without_a_stream_has_none_to_break():
    rehearsal = Rehearsal()
    rehearsal.begin("cut", 0.0, None)
    rehearsal.begin("damage", 0.0, None)
