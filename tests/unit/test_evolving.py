"""Older and newer versions of a dataclass read one another's values."""

import pickle
from dataclasses import dataclass, field, fields

import pytest

from cluster.config import ClusterConfig
from cluster.evolving import evolving
from cluster.runtime.workers.protocol import ClusterRecord
from cluster.status import ClusterStatus, ShardStatus
from cluster.types import EngineRequest, SamplingParams, SequenceUpdate


@evolving(__name__)
@dataclass(frozen=True, slots=True, kw_only=True)
class Old:
    first: int
    last: int = 0


@evolving(__name__)
@dataclass(frozen=True, slots=True, kw_only=True)
class New:
    """With fields in between, and without the last."""

    first: int
    between: str = "default"
    made: list[int] = field(default_factory=lambda: [1])


@evolving(__name__)
@dataclass(slots=True, kw_only=True)
class Strict:
    first: int
    needed: int


def read_as(cls, value):
    made = cls.__new__(cls)
    made.__setstate__(value.__getstate__())
    return made


def test_a_newer_version_gives_fields_that_it_misses_their_defaults():
    assert read_as(New, Old(first=7, last=8)) == New(first=7, between="default", made=[1])


def test_an_older_version_ignores_what_it_does_not_know():
    assert read_as(Old, New(first=7, between="x")) == Old(first=7, last=0)


def test_a_new_field_without_a_default_is_refused_by_name():
    with pytest.raises(TypeError, match="a Strict of another version has no needed"):
        read_as(Strict, Old(first=1))


@pytest.mark.parametrize(
    "value",
    [
        EngineRequest(request_id="a", prompt_token_ids=(1, 2), params=SamplingParams(seed=3, stop=("x",))),
        SequenceUpdate(request_id="a", token_ids=(4,), error=None),
        ClusterConfig(model="/m", expert_shards=3),
        ShardStatus(shard_id=1, state="up"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_travels_comes_out_as_it_went_in(value):
    assert pickle.loads(pickle.dumps(value)) == value
    assert pickle.loads(pickle.dumps(value)).__getstate__().keys() == {f.name for f in fields(value)}


def test_what_processes_of_two_versions_exchange_is_evolving():
    for cls in (ClusterRecord, ClusterStatus, EngineRequest, SamplingParams, SequenceUpdate, ClusterConfig):
        assert cls.__getstate__.__module__ == "cluster.evolving"
