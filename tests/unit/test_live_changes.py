"""Calls that change a cluster: for administrators alone, and their ends; on fakes of the cluster and of Ray."""

import asyncio
import logging
from types import SimpleNamespace

import pytest
import ray
from http_tools import Front
from serving_fakes import write_tokenizer
from test_live_feed import FakeSource, feed_of, status

from cluster.errors import ClusterError, InvalidRequest, SetupError, ShardUnavailable, Unavailable
from cluster.runtime.front import operations
from cluster.runtime.front.operations import RayOperations
from cluster.serving.admission.admission import Admission, AdmissionLimits
from cluster.serving.admission.api_keys import ApiKeys, new_key
from cluster.serving.text.tokenizer import Tokenizer

KILL = ("/cluster/kill-shard", {"shard_id": 1})
CALLS = [KILL, ("/cluster/rebalance", {}), ("/cluster/scale", {"expert_shards": 3})]


class FakeOperations:
    """Writes changes and notes down. `slow` ones last until `end`; then they fail with `error`, if there is one."""

    def __init__(self):
        self.made, self.noted, self.slow, self.end, self.error = [], [], False, asyncio.Event(), None

    async def note(self, what):
        self.noted.append(what)

    async def _make(self, *change):
        self.made.append(change)
        if self.slow:
            await self.end.wait()
        if self.error is not None:
            raise self.error
        return f"done {change}"

    def kill_shard(self, shard_id):
        return self._make("kill", shard_id)

    def rebalance(self):
        return self._make("rebalance")

    def scale_experts(self, num_shards):
        return self._make("experts", num_shards)

    def scale_attention(self, num_replicas):
        return self._make("attention", num_replicas)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def key_file(path, name):
    key, line = new_key(name)
    path.write_text(line)
    return ApiKeys(path, lambda: 0.0), key


def bearer(key, **more):
    return {"authorization": f"Bearer {key}"} | more


@pytest.fixture
def server(tokenizer, tmp_path):
    """Asks for keys, and has an administrator: `server(keys=False)` asks for none, `admins=False` has none."""

    def make(keys=True, admins=True):
        api, client = key_file(tmp_path / "keys", "client")
        root, admin = key_file(tmp_path / "admins", "root")
        admission = Admission(
            api if keys else None, AdmissionLimits(max_watchers=2), admins=root if admins else None, clock=lambda: 0.0
        )
        fake = FakeOperations()
        front = Front(tokenizer, admission=admission, live=feed_of(FakeSource()), operations=fake)
        return SimpleNamespace(front=front, admission=admission, fake=fake, client=client, admin=admin)

    return make


@pytest.mark.parametrize(("path", "body"), CALLS)
def test_only_an_admin_key_allows_a_change(server, path, body):
    it = server()
    for headers, code in (({}, 401), (bearer("wrong"), 401), (bearer(it.client), 403)):
        answer = asyncio.run(it.front.post(path, body, headers=headers))
        assert answer.status_code == code
        assert answer.json()["error"]["message"]
    assert it.fake.made == []
    assert asyncio.run(it.front.post(path, body, headers=bearer(it.admin))).status_code == 200
    assert len(it.fake.made) == 1


@pytest.mark.parametrize(("path", "body"), CALLS)
def test_without_admin_keys_changes_are_off_for_everybody(server, path, body):
    it = server(keys=False, admins=False)
    for headers in ({}, bearer(it.admin), bearer(it.client)):
        answer = asyncio.run(it.front.post(path, body, headers=headers))
        assert answer.status_code == 403
        assert "admin_keys_file" in answer.json()["error"]["message"]
    assert it.fake.made == []


def test_a_server_that_is_open_to_all_lets_its_administrator_alone_change_it(server):
    it = server(keys=False)
    path, body = KILL
    assert asyncio.run(it.front.post(path, body)).status_code == 403
    assert asyncio.run(it.front.post(path, body, headers=bearer(it.client))).status_code == 403
    answer = asyncio.run(it.front.post(path, body, headers=bearer(it.admin)))
    assert answer.json() == {"state": "done", "text": "done ('kill', 1)"}


def test_a_caller_learns_its_rights(server):
    def rights(it, key):
        return asyncio.run(it.front.get("/cluster/rights", headers=bearer(key))).json()

    it = server()
    assert rights(it, it.client) == {"configured": True, "allowed": False, "name": ""}
    assert rights(it, it.admin) == {"configured": True, "allowed": True, "name": "root"}
    assert rights(server(keys=False, admins=False), "any") == {"configured": False, "allowed": False, "name": ""}


def test_an_admin_key_answers_other_calls_too(server):
    it = server()
    chat = {"messages": [{"role": "user", "content": "hello"}]}
    answer = asyncio.run(it.front.post("/v1/chat/completions", chat, headers=bearer(it.admin)))
    assert answer.status_code == 200
    assert asyncio.run(it.front.get("/cluster", headers=bearer(it.admin))).status_code == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site", "anything"])
def test_a_page_of_another_site_changes_nothing(server, site):
    it = server()
    path, body = KILL
    answer = asyncio.run(it.front.post(path, body, headers=bearer(it.admin, **{"sec-fetch-site": site})))
    assert answer.status_code == 403
    ours = asyncio.run(it.front.post(path, body, headers=bearer(it.admin, **{"sec-fetch-site": "same-origin"})))
    assert ours.status_code == 200


def test_a_form_of_another_page_is_no_call(server):
    """A browser sends a form, or text, to another site without asking it first; JSON it does not."""

    async def run(it, kind):
        async with it.front.client() as client:
            headers = bearer(it.admin, **{"content-type": kind})
            return await client.post("/cluster/kill-shard", content=b'{"shard_id": 1}', headers=headers)

    it = server()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert asyncio.run(run(it, kind)).status_code == 415
    answer = asyncio.run(it.front.get("/cluster/rights", headers={"cookie": f"authorization=Bearer {it.admin}"}))
    assert answer.status_code == 401
    assert it.fake.made == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/cluster/kill-shard", {}),
        ("/cluster/kill-shard", {"shard_id": -1}),
        ("/cluster/kill-shard", {"shard_id": "1"}),
        ("/cluster/kill-shard", {"shard_id": 1, "more": 2}),
        ("/cluster/scale", {}),
        ("/cluster/scale", {"expert_shards": 0}),
        ("/cluster/scale", {"expert_shards": 2, "attention_replicas": 2}),
        ("/cluster/scale", {"attention_replicas": 10**9}),
        ("/cluster/rebalance", {"now": True}),
        ("/cluster/rebalance", []),
    ],
)
def test_bodies_that_mean_nothing_are_refused(server, path, body):
    it = server()
    assert asyncio.run(it.front.post(path, body, headers=bearer(it.admin))).status_code == 400
    assert it.fake.made == []


def test_a_long_change_goes_on_when_its_caller_has_its_answer(server, monkeypatch):
    monkeypatch.setattr("cluster.serving.openai.changes.PATIENCE_S", 0.01)

    async def run():
        it = server()
        it.fake.slow = True
        answer = await it.front.post("/cluster/scale", {"attention_replicas": 3}, headers=bearer(it.admin))
        assert (answer.status_code, answer.json()["state"]) == (202, "under way")
        it.fake.end.set()
        assert it.fake.made == [("attention", 3)]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("error", "noted"),
    [
        (None, []),
        (Unavailable("shard 2 does not come up"), ["3 attention replicas failed: shard 2 does not come up"]),
        (OSError("/secret"), ["3 attention replicas failed: see the log of the ingress"]),
    ],
)
def test_a_change_that_fails_after_its_answer_is_shown_to_all_who_watch(server, monkeypatch, error, noted):
    monkeypatch.setattr("cluster.serving.openai.changes.PATIENCE_S", 0.01)

    async def run():
        it = server()
        it.fake.slow, it.fake.error = True, error
        answer = await it.front.post("/cluster/scale", {"attention_replicas": 3}, headers=bearer(it.admin))
        assert (answer.status_code, it.fake.noted) == (202, [])
        it.fake.end.set()
        for _ in range(10):  # turns of the loop: the change ends, then the note of it is made
            await asyncio.sleep(0)
        assert it.fake.noted == noted

    asyncio.run(run())


def test_a_change_that_fails_at_once_tells_its_caller_alone(server):
    it = server()
    it.fake.error = Unavailable("shard 1 has no process now")
    answer = asyncio.run(it.front.post(*KILL, headers=bearer(it.admin)))
    assert (answer.status_code, it.fake.noted) == (503, [])


def test_changes_are_in_the_log_with_their_makers_name(server, caplog):
    it = server()
    with caplog.at_level(logging.INFO):
        asyncio.run(it.front.post(*KILL, headers=bearer(it.admin)))
    assert "root asks for a change: kill shard 1" in caplog.text
    assert it.admin not in caplog.text


def test_watchers_are_bounded_and_take_no_place_of_a_request(server):
    it = server(keys=False)
    admission, headers = it.admission, {"x-client-id": "any"}
    with admission.watcher(headers, "10.0.0.1"), admission.watcher(headers, "10.0.0.2"):
        assert admission.num_running == 0
        answer = asyncio.run(it.front.get("/cluster/live"))
        assert (answer.status_code, "retry-after" in answer.headers) == (429, True)
        assert asyncio.run(it.front.get("/cluster")).status_code == 200


class Remote:
    """An actor's method that gives an answer, or raises."""

    def __init__(self, answer):
        self.answer = answer

    async def remote(self, *arguments):
        if isinstance(self.answer, Exception):
            raise self.answer
        return f"{self.answer} {arguments}"


def failed(cause):
    return ray.exceptions.RayTaskError("rebalance", "trace", cause)


def test_a_shard_is_killed_by_its_actors_name(monkeypatch):
    killed = []
    monkeypatch.setattr(operations.ray, "get_actor", lambda name, namespace: f"actor {name}")
    monkeypatch.setattr(operations.ray, "kill", killed.append)
    it = RayOperations(None, status, None)
    assert asyncio.run(it.kill_shard(1)) == "shard 1 is killed"
    assert killed == [f"actor {status().shards[1].actor}"]
    with pytest.raises(InvalidRequest, match="there is no shard 2: there are 2"):
        asyncio.run(it.kill_shard(2))
    monkeypatch.setattr(operations.ray, "get_actor", lambda name, namespace: {}[name])
    monkeypatch.setattr(operations.ray, "get_actor", _nobody)
    with pytest.raises(Unavailable, match="being replaced"):
        asyncio.run(it.kill_shard(1))


def _nobody(name, namespace):
    raise ValueError(name)


def test_the_controllers_refusal_is_told_and_its_death_is_to_be_tried_again():
    def ask(answer):
        controller = SimpleNamespace(rebalance=Remote(answer), scale=Remote(answer))
        it = RayOperations(controller, status, None)
        return asyncio.run(it.rebalance()), asyncio.run(it.scale_experts(3))

    assert ask("moved") == ("moved ()", "moved (3,)")
    with pytest.raises(InvalidRequest, match="ask for 1 to 4"):
        ask(failed(SetupError("9 expert shards for 4 experts a layer: ask for 1 to 4")))
    with pytest.raises(InvalidRequest, match="the expert controller refuses it: odd"):
        ask(failed(ValueError("odd")))
    with pytest.raises(Unavailable):
        ask(ray.exceptions.RayActorError())
    for failure in (ShardUnavailable("shard 1 is gone", 1), ClusterError("rebalance failed: a shard did not load")):
        with pytest.raises(Unavailable, match=str(failure)):
            ask(failed(failure))


def test_a_note_reaches_the_controller_or_the_log(caplog):
    noted = []

    class Controller:
        class note_fault:
            @staticmethod
            async def remote(what):
                noted.append(what)

    asyncio.run(RayOperations(Controller(), status, None).note("it failed"))
    assert noted == ["it failed"]
    for lacking in (SimpleNamespace(), SimpleNamespace(note_fault=Remote(ray.exceptions.RayActorError()))):
        asyncio.run(RayOperations(lacking, status, None).note("this too"))
    assert caplog.text.count("this too") == 2
