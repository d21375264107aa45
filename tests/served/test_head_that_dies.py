"""The head of three hosts dies and comes back. With a Redis nothing of it is seen in the answers.

With `--log-cli-level=info -o log_cli=true` it says for how long new requests waited.
"""

import json
import logging
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
from hosts import hosts, needs_namespaces, read_line

from cluster.runtime.front.haproxy import ray_environment

log = logging.getLogger(__name__)
REDIS = os.environ.get("REDIS") or shutil.which("redis-server")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.chaos,
    needs_namespaces,
    pytest.mark.skipif(not REDIS, reason="needs a redis-server, in the PATH or named by REDIS"),
]
PROGRAM = [sys.executable, str(Path(__file__).with_name("headless.py"))]
AWAY_S = 20.0


def environment(host, folder):
    return {name: value.replace("/tmp/moe-haproxy-", f"{folder}-{host}-") for name, value in ray_environment().items()}


class Rounds:
    """The rounds of a program that asks."""

    def __init__(self, asking):
        self._asking = asking
        self.made = []

    def next(self):
        self.made.append(json.loads(read_line(self._asking, 120.0)))

    def assert_that_all_is_well(self):
        assert [error for made in self.made for error in made["failed"]] == []
        assert sum(made["different"] for made in self.made) == 0


def state(net):
    done = net.run(1, *PROGRAM, "state", net.address)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


@pytest.mark.timeout(600)
def test_requests_are_answered_while_the_head_is_away_and_it_takes_up_again(demo_checkpoint):
    """An engine dies while it is away, too: its streams go on at the other one. A shard dies once it is back,
    and then a whole host, with the front that the client has been talking to."""
    with hosts(3, num_cpus=6, environment=environment, resources={"moe_ingress": 1000}, redis=REDIS) as net:
        done = net.run(1, *PROGRAM, "serve", net.address, str(demo_checkpoint))
        assert done.returncode == 0, done.stderr[-3000:]
        asking = net.popen(2, *PROGRAM, "ask", f"ipv4:{net.ip(1)}:9000,{net.ip(2)}:9000")
        rounds = Rounds(asking)
        try:
            rounds.next()
            rounds.next()
            before = state(net)
            quiet = len(rounds.made)
            net.kill_head()
            killed_at = time.monotonic()
            while time.monotonic() - killed_at < AWAY_S:
                rounds.next()
            away = rounds.made[quiet:]
            engine, shard = before["replicas"][0], min(map(int, before["shards"]))
            os.kill(engine, 9)
            rounds.next()
            rounds.next()
            net.start_ray(0)
            os.kill(shard, 9)
            while not is_whole(after := state(net), before, {engine, shard}):
                rounds.next()
            assert after["controller"] == before["controller"]
            net.kill_host(1)
            rounds.next()
            rounds.next()
            rounds.next()
        finally:
            asking.kill()
            asking.wait()
    rounds.assert_that_all_is_well()
    log.info("first token behind the death of a host: %s", first_tokens(rounds.made[-3:]))
    log.info("first token while the head lives: %s", first_tokens(rounds.made[:quiet]))
    log.info("first token while it is away: %s", first_tokens(away))


def first_tokens(made):
    waits_s = sorted(wait_s for one in made for wait_s in one["waits_s"])
    return f"median {waits_s[len(waits_s) // 2]:.2f} s, most {waits_s[-1]:.2f} s of {len(waits_s)}"


def is_whole(after, before, victims):
    """Whether those that were killed have successors that serve."""
    pids = {*map(int, after["shards"]), *after["replicas"]}
    return (
        not pids & victims
        and len(after["replicas"]) == len(before["replicas"])
        and list(after["shards"].values()) == list(before["shards"].values())
    )
