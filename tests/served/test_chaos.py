"""The short form of `moe-cluster chaos`, on the served application: every kind of fault, every answer compared."""

import pytest

from cluster.chaos.command import KINDS, unleash
from cluster.client.grpc_client import Client
from cluster.errors import SetupError
from cluster.runtime.operate import RunningCluster

pytestmark = [pytest.mark.ray, pytest.mark.chaos]


@pytest.fixture
def cluster(served):
    with RunningCluster() as running:
        yield running


def test_no_request_is_lost_and_no_answer_changes_whatever_breaks(cluster, served):
    with Client(f"127.0.0.1:{served.grpc_port}") as client:
        outcome = unleash(cluster, client, requests=20, faults=len(KINDS), kinds=KINDS, concurrency=4, seed=1)
    assert outcome.errors == ()
    assert (outcome.failed, outcome.different) == (0, 0)
    assert sum(outcome.faults.values()) == len(KINDS)
    assert cluster.scale_experts(2)  # as it was


def test_what_cannot_be_is_refused(cluster):
    with pytest.raises(SetupError, match="at least 1 is needed"):
        cluster.scale_attention(0)
    with pytest.raises(SetupError, match="ask for 1 to 64"):
        cluster.scale_experts(65)
