"""How an ingress reads a cluster for its watchers; on fakes of Ray's actors."""

import asyncio
from types import SimpleNamespace

import pytest
import ray
import torch
from test_live_feed import PLAN, process, stats, status

from cluster.errors import Unavailable
from cluster.runtime.front import live
from cluster.runtime.front.live import RayLiveSource
from cluster.runtime.gcs import GcsThread
from cluster.runtime.names import metrics_name
from cluster.status import ReplicaStatus, ShardStatus

TOKENS = torch.arange(16).reshape(4, 4)  # four layers, of which the second and the last are sparse


class Method:
    """An actor's method: answers, or fails, or never answers."""

    def __init__(self, answer):
        self.answer, self.asked = answer, 0

    async def remote(self, as_array=False):
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        if self.answer is None:
            await asyncio.Event().wait()
        return self.answer.numpy() if as_array else self.answer


class OlderMethod(Method):
    async def remote(self):
        return await super().remote()


@pytest.fixture
def actors(monkeypatch):
    """By name; those that are not there raise as Ray does."""
    known = {}

    def get_actor(name, namespace):
        if name not in known:
            raise ValueError(name)
        return known[name]

    monkeypatch.setattr(live.ray, "get_actor", get_actor)
    monkeypatch.setattr(live, "TIMEOUT_S", 0.05)
    return known


def shards(*states):
    return tuple(
        ShardStatus(shard_id=i, actor=f"shard-{i}", state=state, process=process(10 + i))
        for i, state in enumerate(states)
    )


def test_each_living_shards_counters_of_sparse_layers_are_read(actors):
    actors["shard-0"] = SimpleNamespace(expert_tokens=Method(TOKENS))
    actors["shard-1"] = SimpleNamespace(expert_tokens=Method(ray.exceptions.RayActorError()))
    actors["shard-2"] = SimpleNamespace(expert_tokens=Method(None))
    actors["shard-4"] = SimpleNamespace(expert_tokens=OlderMethod(TOKENS))
    now = status(PLAN, shards=shards("up", "up", "up", "up", "loading"), replicas=())
    reading = asyncio.run(RayLiveSource("group", lambda: now, GcsThread()).read())
    assert {source: counts.tolist() for source, counts in reading.counters.items()} == {
        (0, 10): [[4, 5, 6, 7], [12, 13, 14, 15]]
    }
    assert actors["shard-4"].expert_tokens.asked == 0


def test_a_shards_successor_is_found_under_its_name(actors):
    now = status(PLAN, shards=shards("up"), replicas=())
    source = RayLiveSource("group", lambda: now, GcsThread())
    actors["shard-0"] = SimpleNamespace(expert_tokens=Method(ray.exceptions.RayActorError()))
    assert asyncio.run(source.read()).counters == {}
    actors["shard-0"] = SimpleNamespace(expert_tokens=Method(TOKENS))
    assert list(asyncio.run(source.read()).counters) == [(0, 10)]


def test_a_shard_that_was_scaled_away_is_forgotten(actors):
    """Its handle would stay for ever, and so would that of each process of metrics."""
    counters, render = Method(TOKENS), Method(b"")
    actors.update({f"shard-{i}": SimpleNamespace(expert_tokens=counters) for i in range(3)})
    actors[metrics_name("group", "b")] = SimpleNamespace(render=render)
    last = ShardStatus(shard_id=2, actor="shard-2", state="up", process=process(12, "b"))
    now = status(PLAN, shards=(*shards("up", "up"), last), replicas=())
    source = RayLiveSource("group", lambda: now, GcsThread())
    asyncio.run(source.read())
    assert source.known_actors == {"shard-0", "shard-1", "shard-2", metrics_name("group", "b")}
    now = status(PLAN, shards=shards("up"), replicas=())
    asyncio.run(source.read())
    assert source.known_actors == {"shard-0"}


def test_an_engine_that_is_busy_keeps_its_last_figures(actors):
    def replica(name, engine, known):
        return ReplicaStatus(name=name, process=process(20), engine=engine, asked_at=0.0, stats=known)

    replicas = (
        replica("quick", SimpleNamespace(stats=Method(stats(7))), stats(1)),
        replica("busy", SimpleNamespace(stats=Method(None)), stats(2)),
        replica("loading", SimpleNamespace(stats=Method(None)), None),
        replica("no engine", None, stats(3)),
    )
    reading = asyncio.run(
        RayLiveSource("group", lambda: status(PLAN, shards=(), replicas=replicas), GcsThread()).read()
    )
    assert {name: each.generated_tokens for name, each in reading.stats.items()} == {"quick": 7, "busy": 2}


def test_every_nodes_figures_are_read_together_and_not_each_time(actors):
    now = status(PLAN)  # processes on the nodes a and b
    actors["group:metrics-a"] = SimpleNamespace(render=Method(b"one 1\n"))
    actors["group:metrics-b"] = SimpleNamespace(render=Method(b"two 2\n"))
    source = RayLiveSource("group", lambda: status(PLAN, shards=now.shards, replicas=()), GcsThread())
    assert asyncio.run(source.read()).exposition == "one 1\ntwo 2\n"
    assert asyncio.run(source.read()).exposition == ""


def test_half_of_the_nodes_figures_are_none(actors):
    """Totals that fall and rise again would look like traffic."""
    actors["group:metrics-a"] = SimpleNamespace(render=Method(b"one 1\n"))
    reading = asyncio.run(RayLiveSource("group", lambda: status(PLAN, replicas=()), GcsThread()).read())
    assert reading.exposition == ""


def test_without_a_status_there_is_no_reading(actors):
    with pytest.raises(Unavailable):
        asyncio.run(RayLiveSource("group", lambda: None, GcsThread()).read())
