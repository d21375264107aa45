"""The messages for an operator when a cluster does not answer as it should. Without Ray."""

from types import SimpleNamespace

import pytest

from cluster.errors import Unavailable
from cluster.runtime import operate
from cluster.runtime.operate import RunningCluster


def test_a_roll_whose_controller_never_takes_up_its_shards_ends(monkeypatch):
    monkeypatch.setattr(operate, "CHANGE_TIMEOUT_S", 0.5)
    monkeypatch.setattr(operate.ray, "kill", lambda actor, no_restart: None)
    monkeypatch.setattr(operate.ray, "get_actor", lambda name, namespace: None)
    cluster = RunningCluster.__new__(RunningCluster)
    cluster.group = "group"
    cluster._ask = lambda method, timeout_s: object()  # another process each time
    cluster.status = lambda: SimpleNamespace(published=False)
    with pytest.raises(Unavailable, match=r"the controller was not back in 0.5 s"):
        cluster.roll()
