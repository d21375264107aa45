"""The short form of `moe-cluster chaos`, on the served application: every kind of fault, every answer compared."""

import pytest

from cluster.chaos.command import KINDS, QUICK_KINDS, unleash
from cluster.client.grpc_client import Client
from cluster.client.http_streams import HttpStreams
from cluster.errors import SetupError
from cluster.runtime.operate import RunningCluster

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

OTHER_KINDS = tuple(kind for kind in KINDS if kind not in (*QUICK_KINDS, "kill-rank"))  # replicas have no ranks here
HTTP_KINDS = ("kill-replica", "kill-haproxy", "kill-shard", "kill-ingress", "kill-controller", "cut-streams")


@pytest.fixture
def cluster(served):
    with RunningCluster() as running:
        yield running


@pytest.mark.parametrize(
    "kinds", [QUICK_KINDS, pytest.param(OTHER_KINDS, marks=pytest.mark.slow)], ids=["quick", "the others"]
)
def test_no_request_is_lost_and_no_answer_changes_whatever_breaks(cluster, served, kinds):
    with Client(f"127.0.0.1:{served.grpc_port}") as client:
        outcome = unleash(cluster, client, requests=20, faults=len(kinds), kinds=kinds, concurrency=4, seed=1)
    assert outcome.errors == ()
    assert (outcome.failed, outcome.different) == (0, 0)
    assert sum(outcome.faults.values()) == len(kinds)
    assert cluster.scale_experts(2)  # as it was


@pytest.mark.slow
def test_over_http_too_no_answer_is_lost_or_changed(cluster, served):
    asker = HttpStreams(served.http_url, goes_on=True)
    with Client(f"127.0.0.1:{served.grpc_port}") as client:
        outcome = unleash(cluster, client, requests=20, faults=6, kinds=HTTP_KINDS, concurrency=4, seed=2, asker=asker)
    assert outcome.errors == ()
    assert (outcome.failed, outcome.different) == (0, 0)
    assert sum(outcome.faults.values()) == len(HTTP_KINDS)


def test_what_cannot_be_is_refused(cluster):
    with pytest.raises(SetupError, match="at least 1 is needed"):
        cluster.scale_attention(0)
    with pytest.raises(SetupError, match="ask for 1 to 64"):
        cluster.scale_experts(65)
