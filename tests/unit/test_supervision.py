"""A shard of a cluster that never served is not started for ever: memory that is not there does not come."""

import asyncio
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from cluster.errors import SetupError
from cluster.runtime.control import supervision
from cluster.runtime.control.supervision import MAX_FIRST_STARTS, ShardSupervision

NO_MEMORY = RuntimeError("can't allocate memory: you tried to allocate 35184372072448 bytes.\nError code 12")


class FakeShard:
    """A shard whose every start raises the next of `errors`."""

    def __init__(self, errors: list[BaseException]) -> None:
        self.errors = deque(errors)
        self.shard_id, self.leaves, self.handle, self.status = 3, False, None, SimpleNamespace(process=None)

    async def start(self, node_id: object, spares: object) -> None:
        raise self.errors.popleft()

    def down(self) -> None:
        pass


class FakeState:
    group, shards = "g", {}

    def __init__(self, *, published: bool) -> None:
        self.published = published
        self.notes: list[str] = []
        self.metrics = SimpleNamespace(respawned=lambda shard_id: None)

    def note(self, what: str) -> None:
        self.notes.append(what)


def supervise(shard: FakeShard, state: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "RESPAWN_BACKOFF_S", (0.0,))
    supervised = ShardSupervision(state, None)  # type: ignore[arg-type]
    monkeypatch.setattr(supervised, "_emptiest_node", lambda: None)
    asyncio.run(supervised._supervise(shard))  # type: ignore[arg-type]


def task_error(cause: BaseException) -> BaseException:
    return ray.exceptions.RayTaskError("load", "Traceback …", cause)


def test_a_shard_without_memory_is_given_up_with_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    shard, state = FakeShard([task_error(NO_MEMORY)] * MAX_FIRST_STARTS), FakeState(published=False)
    with pytest.raises(SetupError, match=r"shard 3 did not load in 5 attempts, .* allocate 35184372072448") as caught:
        supervise(shard, state, monkeypatch)
    assert str(caught.value).isprintable()
    assert len(state.notes) == MAX_FIRST_STARTS - 1


def test_a_shard_that_is_killed_at_each_start_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    shard = FakeShard([ray.exceptions.RayActorError()] * MAX_FIRST_STARTS)
    with pytest.raises(SetupError, match="did not load in 5 attempts, the last one died"):
        supervise(shard, FakeState(published=False), monkeypatch)


def test_a_cluster_that_served_goes_on_trying(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty failures; the next one is a SetupError, which ends the test."""
    shard = FakeShard([*[task_error(NO_MEMORY)] * 20, task_error(SetupError("the end"))])
    with pytest.raises(SetupError, match="the end"):
        supervise(shard, FakeState(published=True), monkeypatch)
