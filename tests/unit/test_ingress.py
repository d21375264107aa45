"""The way from an ingress to Serve's replicas, on fakes of Serve's handle and of an engine. Starts no Ray."""

import asyncio
from contextlib import aclosing
from types import SimpleNamespace

import pytest
import ray
import virtual_time
from engine_fakes import request

from cluster.errors import ReplicaStopping, ReplicaUnavailable
from cluster.runtime.front import ingress
from cluster.runtime.front.ingress import HEALTH_INTERVAL_S, Ingress, ServeReplicas
from cluster.runtime.front.prefix_balancer import PrefixBalancer
from cluster.types import SequenceUpdate


class SilentResponse:
    """Serve's response of a replica that took a request and whose host then went away: no word, no broken connection.

    As gRPC does it, a cancel ends the wait for the next message with CancelledError.
    """

    def __init__(self, *updates):
        self.updates = list(updates)
        self.cancelled = asyncio.Event()

    def __aiter__(self):
        return self

    async def __anext__(self):
        if self.updates:
            return self.updates.pop(0)
        await self.cancelled.wait()
        raise asyncio.CancelledError

    def cancel(self):
        self.cancelled.set()


class Engine:
    """Dies when told to."""

    def __init__(self):
        self.death = asyncio.Event()
        self.hold = self.cancel = self
        self.cancelled = []

    def remote(self, *arguments):
        if arguments:
            self.cancelled += arguments[0]
            return None
        return self._hold()

    async def _hold(self):
        await self.death.wait()
        raise ray.exceptions.RayActorError


def replicas_of(response):
    method = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda asked: response))
    return ServeReplicas(SimpleNamespace(generate=method, ready=None), PrefixBalancer())


async def collect(replicas):
    return [update async for update in replicas.generate(request("a"))]


def test_a_stream_of_a_host_that_is_gone_ends_with_rays_word_of_its_engine(monkeypatch):
    monkeypatch.setattr(ingress, "FAREWELL_S", 0.0)

    async def run():
        response = SilentResponse(
            SequenceUpdate(request_id="a", replica="r1"), SequenceUpdate(request_id="a", token_ids=(5,))
        )
        replicas, gone, other = replicas_of(response), Engine(), Engine()
        replicas.watch({"r1": gone, "r2": other})
        asking = asyncio.create_task(collect(replicas))
        await asyncio.sleep(0)
        assert not asking.done()
        gone.death.set()
        with pytest.raises(ReplicaUnavailable, match="gone, with its host"):
            await asking
        assert other.cancelled == ["a"]  # whoever may still run it

    asyncio.run(run())


def test_a_stream_outlives_a_moment_in_which_ray_cannot_reach_its_engine():
    """For 10 s, until Ray says that it has died."""

    class Unreachable(Engine):
        asked = 0

        async def _hold(self):
            self.asked += 1
            if asyncio.get_running_loop().time() < 10.0:
                raise ray.exceptions.ActorUnavailableError("no connection", None)
            await super()._hold()

    async def run():
        replicas, engine = replicas_of(SilentResponse(SequenceUpdate(request_id="a", replica="r1"))), Unreachable()
        replicas.watch({"r1": engine})
        asking = asyncio.create_task(collect(replicas))
        await asyncio.sleep(100.0)
        assert not asking.done()
        assert engine.asked < 20
        engine.death.set()
        with pytest.raises(ReplicaUnavailable, match="gone, with its host"):
            await asking

    virtual_time.run(run)


def test_a_client_that_leaves_cancels_and_is_not_taken_for_a_lost_replica():
    async def run():
        response = SilentResponse(SequenceUpdate(request_id="a", replica="r1"))
        replicas = replicas_of(response)
        replicas.watch({"r1": Engine()})
        asking = asyncio.create_task(collect(replicas))
        await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert response.cancelled.is_set()

    asyncio.run(run())


class Method:
    """Serve's handle of a method, whose calls all bring the same. named: the replicas that each call asked for."""

    def __init__(self, *updates):
        self.updates = updates
        self.named = []

    def options(self, session_id=None, **_):
        if session_id is not None:
            self.named.append(session_id)
        return self

    def remote(self, asked):
        return SilentResponse(*self.updates)


def test_a_conversation_goes_on_where_it_began():
    """r2 takes its first turn, of 32 tokens, and answers with 16: too few to be worth a busier replica."""
    prompt, answer = tuple(range(32)), tuple(range(50, 66))
    method = Method(
        SequenceUpdate(request_id="a", replica="r2"),
        SequenceUpdate(request_id="a", token_ids=answer, finish_reason="length"),
    )

    async def run():
        replicas = ServeReplicas(SimpleNamespace(generate=method, ready=None), PrefixBalancer())
        replicas.watch({"r1": Engine(), "r2": Engine(), "r3": Engine()})
        for asked in (prompt, (*prompt, *answer, 7)):
            async with aclosing(replicas.generate(request("a", asked))) as updates:
                async for update in updates:
                    if update.finish_reason:
                        break

    asyncio.run(run())
    assert method.named[1:] == ["r2+0"]


def test_a_look_that_fails_is_not_the_last_one(caplog):
    """The lease and the health hang on the next one."""
    looks = []

    async def look():
        looks.append(asyncio.get_running_loop().time())
        if len(looks) < 3:
            raise KeyError("a fault")

    async def run():
        looking = asyncio.create_task(Ingress.__bases__[0]._keep_looking(SimpleNamespace(_look=look)))
        await asyncio.sleep(4.25 * HEALTH_INTERVAL_S)
        looking.cancel()

    virtual_time.run(run)
    assert looks == [HEALTH_INTERVAL_S * (1 + i) for i in range(4)]
    assert caplog.text.count("a look at the cluster failed") == 2


def test_a_request_that_no_replica_takes_may_go_to_another(monkeypatch):
    monkeypatch.setattr(ingress, "ACCEPT_TIMEOUT_S", 0.0)
    with pytest.raises(ReplicaStopping, match="no attention replica took"):
        asyncio.run(ask_silence())


async def ask_silence():
    return await collect(replicas_of(SilentResponse()))
