"""How many attention replicas the load asks for."""

from types import SimpleNamespace

import pytest

from cluster.config import ClusterConfig
from cluster.errors import SetupError
from cluster.runtime.front.autoscaling import engine_load, replicas_by_load, wanted_replicas
from cluster.types import EngineStats


def wanted(current, running, waiting, kv_use):
    return wanted_replicas(current, running=running, waiting=waiting, kv_use=kv_use, seats=16)


@pytest.mark.parametrize(
    ("current", "running", "waiting", "kv_use", "expected"),
    [
        (1, [16], [0], [0.5], 1),  # full but nobody waits
        (1, [16], [3], [0.5], 2),
        (2, [16, 16], [30, 10], [0.5, 0.5], 5),  # 40 wait: three more of 16
        (1, [4], [0], [0.9], 2),  # few long ones fill the cache
        (2, [2, 2], [0, 0], [0.1, 0.1], 1),
        (2, [6, 6], [0, 0], [0.1, 0.1], 2),  # 12 in one of 16 would be too near to full
        (2, [1, 1], [0, 0], [0.4, 0.4], 2),  # their blocks would not fit in one
        (1, [0], [0], [0.0], 1),
        (2, [], [], [], 2),  # nothing is known yet
    ],
)
def test_waiting_sequences_and_full_caches_ask_for_more_and_room_for_fewer(current, running, waiting, kv_use, expected):
    assert wanted(current, running, waiting, kv_use) == expected


def test_the_policy_reads_what_replicas_tell_serve():
    stats = EngineStats(running=16, waiting=5, used_blocks=50, num_blocks=100, generated_tokens=0, at=0.0)
    figures = engine_load(stats, 16)
    context = SimpleNamespace(
        aggregated_metrics={name: {"a": value, "b": value} for name, value in figures.items()},
        target_num_replicas=2,
        policy_state={"kept": 1},
    )
    assert replicas_by_load(context) == (3, {"kept": 1})
    context.aggregated_metrics = {}
    assert replicas_by_load(context) == (2, {"kept": 1})


def test_fewer_replicas_at_most_than_at_least_are_refused():
    with pytest.raises(SetupError, match="max_attention_replicas is 1, at least 2"):
        ClusterConfig(model="m", attention_replicas=2, max_attention_replicas=1)
