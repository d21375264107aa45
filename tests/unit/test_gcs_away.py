"""Callers of Ray's GCS while it is away, as when the head has died. On fakes of Ray; starts none."""

import asyncio
import threading
from types import SimpleNamespace

import pytest
import ray
import virtual_time

from cluster.errors import Unavailable
from cluster.runtime.front import node_metrics
from cluster.runtime.front.ingress import STATUS_TIMEOUT_S, Ingress
from cluster.runtime.front.live import RayLiveSource
from cluster.runtime.front.node_metrics import NodeScraper
from cluster.runtime.gcs import GcsThread


class AwayGcs:
    """A `GcsThread` that gets no answer."""

    async def ask(self, question, *arguments):
        await asyncio.Event().wait()


class Collector:
    def __init__(self, text):
        self.text, self.dead = text, False
        self.render = SimpleNamespace(remote=self._render)

    async def _render(self):
        if self.dead:
            raise ray.exceptions.ActorDiedError
        return self.text


def test_a_question_that_ray_gives_up_after_a_minute_is_asked_again():
    answers = iter([ray.exceptions.GetTimeoutError("the GCS server is dead"), "found"])

    def question(name):
        if isinstance(answer := next(answers), Exception):
            raise answer
        return name, answer

    assert asyncio.run(GcsThread().ask(question, "shard-0")) == ("shard-0", "found")


def no_such_actor():
    raise ValueError("no such actor")


def test_other_failures_are_the_callers():
    with pytest.raises(ValueError, match="no such actor"):
        asyncio.run(GcsThread().ask(no_such_actor))


def test_questions_that_nobody_waits_for_any_more_do_not_pile_up():
    """A scrape each few seconds, for a GCS that is away for minutes: one thread waits, and the others are forgotten."""
    asked, back = [], threading.Event()

    def question(number):
        asked.append(number)
        back.wait()

    async def run():
        gcs = GcsThread()
        waiting = [asyncio.ensure_future(gcs.ask(question, number)) for number in range(20)]
        while not asked:
            await asyncio.sleep(0.001)
        for each in waiting:
            each.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        back.set()
        await gcs.ask(question, "last")

    asyncio.run(run())
    assert asked == [0, "last"]


def test_a_known_collector_answers_scrapes_while_the_gcs_is_away(monkeypatch):
    monkeypatch.setattr(node_metrics.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "n"))
    found = {"group:metrics-n": Collector(b"1")}
    monkeypatch.setattr(node_metrics.ray, "get_actor", lambda name, namespace: found[name])

    async def run():
        scraper = NodeScraper("group", GcsThread())
        first = found["group:metrics-n"]
        assert await scraper.scrape() == b"1"
        scraper._gcs = AwayGcs()
        assert await scraper.scrape() == b"1"
        first.dead = True
        monkeypatch.setattr(node_metrics, "TIMEOUT_S", 0.01)
        with pytest.raises(Unavailable):
            await scraper.scrape()
        scraper._gcs, found["group:metrics-n"] = GcsThread(), Collector(b"2")
        assert await scraper.scrape() == b"2", "the collector that has its name now"

    asyncio.run(run())


def test_watchers_get_the_rest_while_an_actor_cannot_be_looked_up():
    async def run():
        source = RayLiveSource("group", lambda: None, AwayGcs())
        assert await source._ask("group:metrics-n", lambda actor: actor.render.remote()) is None

    virtual_time.run(run)


def test_the_health_looks_at_replicas_though_the_controller_died_with_the_head():
    """It was SERVING; while replicas answer it stays so."""

    class Controller:
        status = SimpleNamespace(remote=lambda: asyncio.Event().wait())

    async def run():
        answers, health = True, []

        async def replicas_answer():
            return answers

        ingress = SimpleNamespace(
            _controller=Controller, _covered=True, _admission=SimpleNamespace(draining=False),
            _replicas=SimpleNamespace(answers=replicas_answer),
            _health=SimpleNamespace(serving=True, set=health.append),
        )  # fmt: skip
        look = Ingress.__bases__[0]._look
        await look(ingress)
        assert asyncio.get_running_loop().time() == STATUS_TIMEOUT_S
        answers = False
        await look(ingress)
        assert health == [True, False]

    virtual_time.run(run)
