"""Requests with one prompt go to one replica: their group's name, the router's choice, the memory of places."""

import ast
import asyncio
import inspect
from collections import deque
from types import SimpleNamespace

import pytest
from http_tools import MODEL, Front
from ray.serve.config import RequestRouterConfig
from serving_fakes import EchoBackend, write_tokenizer

from cluster.runtime.front import shared_prompt_router
from cluster.runtime.front.prompt_groups import MAX_GROUPS, PromptGroups
from cluster.runtime.front.shared_prompt_router import SharedPromptRouter
from cluster.serving.text.tokenizer import Tokenizer

SEATS = 4


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_answers_to_one_prompt_are_a_group(tokenizer):
    """Prompts of 40, 40 and 3 tokens with three answers each: two groups; the short one is computed where it falls."""
    backend = EchoBackend()
    prompts = [[5] * 40, [6] * 40, [1, 2, 3]]
    body = {"model": MODEL, "prompt": prompts, "n": 3, "max_tokens": 1}

    async def ask():
        async with Front(tokenizer, backend).client() as client:
            return await client.post("/v1/completions", json=body)

    assert asyncio.run(ask()).status_code == 200
    groups = [
        {request.prompt_group for request in backend.requests if list(request.prompt_token_ids) == prompt}
        for prompt in prompts
    ]
    assert [len(group) for group in groups] == [1, 1, 1]
    assert groups[0] != groups[1]
    assert groups[2] == {""}


def test_calls_of_one_name_are_groups_of_their_own(tokenizer):
    """A proxy may give all its calls the same x-request-id."""
    backend = EchoBackend()
    body = {"model": MODEL, "prompt": [5] * 40, "n": 2, "max_tokens": 1}

    async def ask():
        async with Front(tokenizer, backend).client() as client:
            for _ in range(2):
                await client.post("/v1/completions", json=body, headers={"x-request-id": "the-same"})

    asyncio.run(ask())
    assert len({request.prompt_group for request in backend.requests}) == 2


def replica(name):
    return SimpleNamespace(replica_id=SimpleNamespace(unique_id=name), max_ongoing_requests=10)


class Router(SharedPromptRouter):
    """Without Serve. num_requests: at each replica."""

    def __init__(self, num_requests):
        self.curr = {name: replica(name) for name in num_requests}
        self.num_requests = {id(self.curr[name].replica_id): num for name, num in num_requests.items()}
        self.initialize_state(max_num_seqs=SEATS)

    curr_replicas = property(lambda self: self.curr)
    replica_queue_len_cache = property(lambda self: SimpleNamespace(get=lambda name: self.num_requests[id(name)]))

    def apply_locality_routing(self, pending_request=None):
        return set(self.curr)

    def names(self, wanted, older=""):
        request = SimpleNamespace(metadata=SimpleNamespace(session_id=wanted, multiplexed_model_id=older))
        chosen = asyncio.run(self.choose_replicas(list(self.curr.values()), request))
        return [sorted(one.replica_id.unique_id for one in rank) for rank in chosen]


@pytest.mark.parametrize(
    ("wanted", "named"),
    [("a", [["a"]]), ("b", []), ("c", [["c"]]), ("gone", []), ("", [])],
    ids=["a seat is free", "all seats are taken", "its load is not known", "the replica is gone", "none is named"],
)
def test_the_named_replica_comes_first_while_it_has_a_seat(wanted, named):
    assert Router({"a": SEATS - 1, "b": SEATS, "c": None}).names(wanted)[:-1] == named


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        ("b+1", []), ("b+2", [["b"]]), ("b+1 a+0", [["a"]]), ("b+1 gone+9 a+1 b+4", [["a"]]), ("full+9", []),
        ("c+0", [["c"]]),
    ],
    ids=["busier", "within the bound", "the next one", "two rounds", "no seat", "its load is not known"],
)  # fmt: skip
def test_a_named_replica_may_have_so_many_requests_more_than_one_of_the_two(wanted, named):
    """The two are always a and b, with 1 and 3 requests."""
    router = Router({"a": 1, "b": 3, "c": None, "full": SEATS})
    router.apply_locality_routing = lambda _: {"a", "b"}
    assert router.names(wanted)[:-1] == named


def test_an_older_ingress_names_a_replica_as_it_did():
    assert Router({"a": 1, "b": 0}).names("", older="a")[0] == ["a"]


def test_two_of_all_replicas_come_next():
    router = Router(dict.fromkeys("abcd", 0))
    pairs = {tuple(router.names("a")[1]) for _ in range(200)}
    assert pairs == {("a", "b"), ("a", "c"), ("a", "d"), ("b", "c"), ("b", "d"), ("c", "d")}
    assert Router({"a": 0}).names("") == [["a"]]
    assert Router({}).names("a") == [[]]


def test_answers_of_one_call_get_their_replicas_one_by_one():
    """Serve gives all of them its one id of the call; a replica that is chosen for a name is for none of another."""

    def waiting(wanted, done=False):
        metadata = SimpleNamespace(session_id=wanted, multiplexed_model_id="", internal_request_id="the-call")
        return SimpleNamespace(metadata=metadata, future=SimpleNamespace(done=lambda: done))

    router = Router({"a": 0, "b": 0})
    taken, other, first, second = waiting("a", done=True), waiting("b+0"), waiting("a"), waiting("a")
    router._pending_requests_to_fulfill = deque([taken, other, first, second])
    assert router._get_pending_request_matching_metadata(second.metadata) is first
    assert router._get_pending_request_matching_metadata(other.metadata) is other
    assert router._get_pending_request_matching_metadata(waiting("").metadata) is None
    assert router._get_pending_request_matching_metadata() is None


def test_an_older_ingress_can_take_the_router():
    """Serve sends it by value; what it imports must be there, so nothing of this package."""
    tree = ast.parse(inspect.getsource(shared_prompt_router))
    imported = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in ast.walk(tree)
                if isinstance(node, ast.Import | ast.ImportFrom)}  # fmt: skip
    assert imported == {"random", "typing", "ray.serve.request_router"}
    sent = RequestRouterConfig(request_router_class=SharedPromptRouter).get_serialized_request_router_cls()
    assert b"choose_replicas" in sent  # by value: a name alone would be of a module that an older version lacks


def test_a_group_stays_where_its_first_request_ran():
    groups = PromptGroups()
    groups.taken("g", "a")
    groups.taken("g", "b")
    groups.taken("", "c")
    assert [groups.replica_of(name) for name in ("g", "h", "")] == ["a", "", ""]
    groups.forget("g")
    groups.forget("g")
    assert groups.replica_of("g") == ""


def test_the_oldest_groups_are_forgotten():
    groups = PromptGroups()
    for number in range(MAX_GROUPS + 1):
        groups.taken(f"g{number}", "a")
    assert [groups.replica_of(f"g{number}") for number in (0, 1, MAX_GROUPS)] == ["", "a", "a"]
