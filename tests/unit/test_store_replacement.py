"""A new process for the store of responses: what is lost, and what goes on, when a part of it dies. Starts no Ray."""

import asyncio
from types import SimpleNamespace

import pytest
import ray
import virtual_time

from cluster.config import ClusterConfig
from cluster.errors import Unavailable
from cluster.runtime.front import response_store, shared_responses
from cluster.runtime.front.response_store import ResponseStoreActor
from cluster.runtime.front.shared_responses import replace_store
from cluster.serving.openai.responses.store import StoredResponse

CONFIG = ClusterConfig(model="model")


def stored(name):
    return StoredResponse(response_id=name, client="me", response="r", items="[]")


class Carrier:
    """Dies at one of its calls, the first of which has the number 0."""

    def __init__(self, dies_at, parts=()):
        self.dies_at, self.parts, self.num_calls = dies_at, list(parts), 0

    def __getattr__(self, method):
        async def remote(*arguments):
            self.num_calls += 1
            if self.num_calls > self.dies_at:
                raise ray.exceptions.RayActorError
            if method == "add":
                self.parts.append(arguments[0])
            return {"num_parts": len(self.parts), "part": self.parts[arguments[0]] if method == "part" else None}.get(
                method
            )

        return SimpleNamespace(remote=remote)


@pytest.fixture
def killed(monkeypatch):
    """Actors that were killed. No store looks for its cluster; each response is a part of its own."""
    ended = []
    monkeypatch.setattr("cluster.serving.openai.responses.kept.PART_BYTES", 1)
    monkeypatch.setattr(response_store, "log_to_ray", lambda: None)
    monkeypatch.setattr(response_store, "LOOK_S", 1e9)
    monkeypatch.setattr(response_store.ray, "kill", lambda actor, **options: ended.append(actor))
    return ended


def with_carrier(monkeypatch, carrier):
    def get_actor(name, namespace):
        if carrier is None:
            raise ValueError(name)
        return carrier

    monkeypatch.setattr(response_store.ray, "get_actor", get_actor)


@pytest.mark.parametrize("dies_at", [0, 1, 2])
def test_a_store_whose_carrier_dies_goes_on_with_all_that_it_has(monkeypatch, killed, dies_at):
    with_carrier(monkeypatch, None)

    async def run():
        store, carrier = ResponseStoreActor("group"), Carrier(dies_at)
        for name in "abc":
            await store.put(stored(name))
        with pytest.raises(ray.exceptions.RayActorError):
            await store.hand_over(carrier)
        assert killed == [carrier]  # a later process would take up half of the responses
        assert [(await store.get(name, "me")).response_id for name in "abc"] == ["a", "b", "c"]

    virtual_time.run(run)


def test_calls_wait_while_a_store_hands_over(monkeypatch, killed):
    with_carrier(monkeypatch, None)

    async def run():
        store, reached = ResponseStoreActor("group"), asyncio.Event()
        await store.put(stored("a"))

        async def clear():
            reached.set()
            await asyncio.sleep(5.0)
            raise ray.exceptions.RayActorError

        handing = asyncio.create_task(store.hand_over(SimpleNamespace(clear=SimpleNamespace(remote=clear))))
        await reached.wait()
        asking = asyncio.create_task(store.get("a", "me"))
        await asyncio.sleep(1.0)
        assert not asking.done()
        with pytest.raises(ray.exceptions.RayActorError):
            await handing
        assert (await asking).response_id == "a"

    virtual_time.run(run)


def test_a_successor_goes_on_with_what_came_before_its_carrier_died(monkeypatch, killed):
    """Of three parts the first: it has asked for their number, then for each."""

    async def run():
        with_carrier(monkeypatch, None)
        before = ResponseStoreActor("group")
        for name in "abc":
            await before.put(stored(name))
        with_carrier(monkeypatch, Carrier(2, before._kept.contents()))
        successor = ResponseStoreActor("group")
        assert (await successor.get("a", "me")).response_id == "a"
        assert successor._kept.usage().num_kept == 1
        await successor.put(stored("d"))

    virtual_time.run(run)


def test_a_store_leaves_a_node_that_ray_drains_once_a_carrier_has_a_place(monkeypatch, killed):
    """The first carrier finds none: it is ended, and the store answers on."""

    class Pending:
        async def _never(self):
            await asyncio.Event().wait()

        num_parts = property(lambda self: SimpleNamespace(remote=self._never))

    async def run():
        with_carrier(monkeypatch, None)
        pending, carrier = Pending(), Carrier(10)
        carriers = [carrier, pending]
        monkeypatch.setattr(response_store, "LOOK_S", 10.0)
        monkeypatch.setattr(ResponseStoreActor, "_until_alone", lambda self: asyncio.sleep(0))
        monkeypatch.setattr(ResponseStoreActor, "_drains", staticmethod(lambda: virtual_time.now() > 15))
        monkeypatch.setattr(response_store, "_custom_resource", lambda: "serving")
        monkeypatch.setattr(response_store, "carrier_actor", lambda group, resource: carriers.pop())
        monkeypatch.setattr(response_store.ray, "get_runtime_context", lambda: SimpleNamespace(current_actor="store"))
        store = ResponseStoreActor("group")
        await store.put(stored("a"))
        await asyncio.sleep(15)
        assert carriers == [carrier, pending]
        await asyncio.sleep(response_store.CARRIER_START_S + 10)
        assert (killed, (await store.get("a", "me")).response_id) == ([pending], "a")
        await asyncio.sleep(10)
        assert killed == [pending, "store"]
        assert len(carrier.parts) == 1

    virtual_time.run(run)


def test_a_store_stays_where_it_is_while_ray_does_not_tell_which_nodes_it_drains(monkeypatch, killed, caplog):
    def away():
        raise ray.exceptions.GetTimeoutError("the GCS server is away")

    async def run():
        with_carrier(monkeypatch, None)
        monkeypatch.setattr(response_store, "LOOK_S", 10.0)
        monkeypatch.setattr(ResponseStoreActor, "_until_alone", lambda self: asyncio.sleep(0))
        monkeypatch.setattr(ResponseStoreActor, "_drains", staticmethod(away))
        await ResponseStoreActor("group").put(stored("a"))
        await asyncio.sleep(25)

    virtual_time.run(run)
    assert [record.getMessage() for record in caplog.records] == [
        "group: Ray does not tell which nodes it drains: the GCS server is away"
    ] * 2
    assert killed == []


def fake_ray(monkeypatch, store, get):
    """Of `replace_store`: with this store alone, and answers by `get`. Returns the carriers that were made."""
    made = []
    monkeypatch.setattr(shared_responses, "_find", lambda name: store)
    monkeypatch.setattr(shared_responses, "carrier_actor", lambda group, resource: made.append("carrier"))
    monkeypatch.setattr(shared_responses.ray, "get", get)
    return made


def test_a_store_of_an_older_version_stays(monkeypatch):
    def get(*arguments, **options):
        raise AssertionError("nothing is asked of it")

    made = fake_ray(monkeypatch, SimpleNamespace(process=None), get)
    assert "its version cannot hand over" in replace_store(CONFIG)
    assert made == []
    fake_ray(monkeypatch, None, get)
    assert replace_store(CONFIG) == ""


@pytest.mark.parametrize("of", [ray.exceptions.RayActorError(), ValueError("a fault")])
def test_a_hand_over_that_fails_is_said(monkeypatch, of):
    """The carrier's death reaches the caller as an error of the store's call, which is a RayActorError, too."""

    class Store:
        process = SimpleNamespace(remote=lambda: "process")
        hand_over = SimpleNamespace(remote=lambda carrier: "hand_over")

    def get(call, timeout):
        if call == "process":
            return "1"
        raise ray.exceptions.RayTaskError("hand_over", "Traceback …", of).as_instanceof_cause()

    assert fake_ray(monkeypatch, Store(), get) == []
    with pytest.raises(Unavailable, match=r"was not replaced .*: try again"):
        replace_store(CONFIG)
