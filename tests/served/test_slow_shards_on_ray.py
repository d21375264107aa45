"""Shards that compute for long, on Ray: neither their callers nor the controller regards them as dead."""

import asyncio
import time
from types import SimpleNamespace

import pytest
import torch

from cluster.config import ClusterConfig
from cluster.errors import ShardUnavailable
from cluster.experts.dispatch import ExpertDispatcher
from cluster.experts.placement import plan_evenly
from cluster.experts.routing import FixedPlan
from cluster.metrics import DispatchMetrics, new_registry
from cluster.runtime.control.launcher import RayLauncher
from cluster.runtime.control.shard_process import ShardProcess
from cluster.runtime.control.spares import SpareProcesses
from cluster.runtime.names import shard_name
from cluster.runtime.process import process_info
from cluster.runtime.workers.shard_actor import SHARD_GROUPS, ExpertShardActor
from cluster.runtime.workers.transports import RayOffers, RayTransport
from cluster.stream.client import StreamTransport

pytestmark = pytest.mark.ray

TIMEOUT_S = 3.0  # both bounds; a call of Ray's takes milliseconds, on a busy machine a second
WORK_S = 7.0


def slow_shard_class():
    """Makes the class here, so that Ray pickles it by value."""

    class SlowShard(ExpertShardActor):
        """work: computes for so long before each answer; below 0 it waits for ever."""

        work_s, num_forwards = 0.0, 0

        def become(self, shard_id):
            super().become(shard_id)
            server, compute = self._server, self._server.compute

            def slowly(batch, waited_s):
                self.num_forwards += 1
                end = time.monotonic() + self.work_s
                while time.monotonic() < end:
                    torch.randn(256, 256) @ torch.randn(256, 256)
                while self.work_s < 0:
                    with server._computing:
                        time.sleep(3600)
                return compute(batch, waited_s)

            server.compute = slowly

        def work(self, seconds):
            self.work_s, self.num_forwards = seconds, 0

        def forwards(self):
            return self.num_forwards

    return SlowShard


@pytest.fixture
def shard(ray_cluster, demo_checkpoint):
    """An actor with all experts of layer 0, with the groups of methods of the controller's shards."""
    actor = ray_cluster.remote(concurrency_groups=SHARD_GROUPS)(slow_shard_class()).options(num_cpus=1).remote(0, 1)
    ray_cluster.get(actor.load.remote(str(demo_checkpoint), {0: range(8)}, "float32", "cpu"))
    yield actor
    ray_cluster.kill(actor)


class Handles:
    def __init__(self, actor):
        self.actor = actor

    def handle(self, shard_id):
        return self.actor


def dispatcher(carrier, actor):
    transport = RayTransport(Handles(actor))
    if carrier == "stream":
        offers, here = RayOffers(Handles(actor)), process_info().node_id
        transport = StreamTransport(offers, node=here, fallback=None, timeout_s=TIMEOUT_S)
    return ExpertDispatcher(
        transport, FixedPlan(plan_evenly([0], 8, 1)), DispatchMetrics(new_registry(), "test"),
        shard_timeout_s=TIMEOUT_S, recovery_timeout_s=TIMEOUT_S,
    )  # fmt: skip


def run(made, hidden_size=64):
    return made.combine(made.dispatch(0, torch.randn(4, hidden_size), torch.arange(8).view(4, 2), torch.ones(4, 2)))


def hidden_size(demo_checkpoint):
    from cluster.checkpoint.reader import CheckpointReader

    return CheckpointReader(demo_checkpoint).config.hidden_size


@pytest.mark.parametrize("carrier", ["ray", pytest.param("stream", marks=pytest.mark.slow)])
def test_an_answer_that_takes_two_timeouts_comes_and_is_computed_once(ray_cluster, shard, carrier, demo_checkpoint):
    made = dispatcher(carrier, shard)
    ray_cluster.get(shard.work.remote(WORK_S))
    assert run(made, hidden_size(demo_checkpoint)).shape[0] == 4
    assert ray_cluster.get(shard.forwards.remote()) == 1
    made.transport.close()


@pytest.mark.slow
def test_a_shard_that_hangs_is_given_up_over_ray_calls(ray_cluster, shard, demo_checkpoint):
    made = dispatcher("ray", shard)
    ray_cluster.get(shard.work.remote(-1.0))
    with pytest.raises(ShardUnavailable, match="shard 0 did not answer for layer 0"):
        run(made, hidden_size(demo_checkpoint))


@pytest.mark.slow
def test_who_watches_a_shard_waits_while_it_works_and_kills_it_when_it_hangs(ray_cluster, shard, demo_checkpoint):
    """The watcher asks every two seconds; the work takes two of its timeouts."""
    config = ClusterConfig(model=str(demo_checkpoint), shard_timeout_s=TIMEOUT_S)
    launcher = RayLauncher("test")
    configured = SimpleNamespace(config=config)
    spares = SpareProcesses("test", configured, launcher)
    watched = ShardProcess("test", shard_name("test", 0), configured=configured, launcher=launcher, spares=spares)
    watched._actor, watched.status.process = shard, ray_cluster.get(shard.process.remote())
    made, size = dispatcher("ray", shard), hidden_size(demo_checkpoint)

    async def watch():
        lost = asyncio.ensure_future(watched.lost())
        await shard.work.remote(WORK_S)
        answer = asyncio.ensure_future(asyncio.to_thread(run, made, size))
        await asyncio.wait([lost, answer], return_when=asyncio.FIRST_COMPLETED)
        assert answer.done()
        assert not lost.done()
        await shard.work.remote(-1.0)
        made.dispatch(0, torch.randn(4, size), torch.arange(8).view(4, 2), torch.ones(4, 2))
        return await lost

    assert "did not get on with its work" in asyncio.run(watch())
