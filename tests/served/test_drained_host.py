"""Hosts that Ray drains; no answer is lost or changed. One is empty before it goes, the last one with room waits."""

import json
import sys
import time
from pathlib import Path

import pytest
from hosts import hosts, needs_namespaces, read_line

from cluster.runtime.front.haproxy import ray_environment

pytestmark = [pytest.mark.slow, pytest.mark.chaos, needs_namespaces]

WAITS = "no other node has room for shards 0, 1 ("

# Serve's and our waits for balancers that ask now and then; here there are none.
BRIEF = {"RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "8", "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2"}


def environment(host, folder):
    """The hosts share /tmp here, and HAProxy's files of one must not be another's."""
    ours = ray_environment()
    return {name: value.replace("/tmp/moe-haproxy-", f"{folder}-{host}-") for name, value in ours.items()} | BRIEF


def test_a_host_that_ray_drains_is_empty_before_it_goes_and_no_answer_changes(demo_checkpoint):
    """Each of two hosts has a shard, without copies, a replica, an ingress and HAProxy. Then one has all. The other's
    HAProxy says that it does not serve while its host leaves, and Ray ends that node, since nothing is left on it. At
    last the other is to leave, too: nothing has room for what is on it, it goes on, and the status says so."""
    with hosts(3, num_cpus=6, environment=environment) as net:
        program = [sys.executable, str(Path(__file__).with_name("drained.py")), net.address, str(demo_checkpoint)]
        asking = net.popen(0, *program, f"{net.ip(1)}:9000", f"{net.ip(2)}:9000")
        try:
            first = json.loads(read_line(asking, 120.0))
            stays, goes = (first["nodes"][net.ip(host)] for host in (1, 2))
            assert set(first["shards"]) == set(first["replicas"]) == {stays, goes}
            assert first["fronts"] == [True, True]
            net.drain(goes, seconds=150)
            rounds, deadline = [first], time.monotonic() + 140
            while goes in rounds[-1]["nodes"].values():
                assert time.monotonic() < deadline, rounds[-1]
                rounds.append(json.loads(read_line(asking)))
            rounds.append(json.loads(read_line(asking)))
            emptied = rounds[-1]
            net.drain(stays, seconds=600)
            deadline = time.monotonic() + 100
            while not all(any(WAITS in waits for waits in made["waits"]) for made in rounds[-3:]):
                assert time.monotonic() < deadline, rounds[-1]
                rounds.append(json.loads(read_line(asking)))
        finally:
            asking.kill()
            asking.wait()
    assert [error for made in rounds for error in made["failed"]] == []
    assert sum(made["different"] for made in rounds) == 0
    for made in (emptied, rounds[-1]):
        assert set(made["shards"]) == set(made["replicas"]) == {stays}
        assert made["respawns"] == 0, "the shard moved, it did not die"
    assert [True, False] in [made["fronts"] for made in rounds]
