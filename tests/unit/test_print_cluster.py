"""Addresses that `serve` and `demo` print come from a status that has them all; tables in a pipe are not padded."""

import math
from dataclasses import replace

import pytest

from cluster.console import print_cluster, print_placement, print_status
from cluster.console.offline import print_findings
from cluster.doctor import Finding
from cluster.status import ClusterStatus, ProcessInfo, ReplicaStatus
from cluster.types import EngineStats

METRICS = ("http://127.0.0.1:9464/metrics",)


def status(num_blocks, metrics_addresses):
    process = ProcessInfo(pid=7, node_id="n", gpu_ids=())
    stats = EngineStats(
        running=0, waiting=0, used_blocks=0, num_blocks=num_blocks, generated_tokens=0, at=0.0, block_size=16
    )
    replica = ReplicaStatus(name="r", process=process, engine=None, asked_at=0.0, stats=stats if num_blocks else None)
    return ClusterStatus(
        epoch=1, shards=(), replicas=(replica,), metrics_addresses=metrics_addresses, draining=False, published=True
    )


class Served:
    """Its controller learns one thing after the other; the last status stays."""

    grpc_address, http_url = "127.0.0.1:8001", "http://127.0.0.1:8000"

    def __init__(self, *seen):
        self.seen = list(seen)

    def status(self):
        return self.seen.pop(0) if len(self.seen) > 1 else self.seen[0]


@pytest.mark.parametrize("earlier", [status(8, ()), status(0, METRICS)], ids=["no metrics yet", "no caches yet"])
def test_a_cluster_is_printed_once_its_metrics_and_its_caches_are_known(earlier, capsys):
    """8 blocks of 16 tokens are 128."""
    served, slept = Served(status(0, ()), earlier, status(8, METRICS)), []
    assert print_cluster(served, slept.append).metrics_addresses == METRICS
    assert len(slept) == 2
    out = capsys.readouterr().out
    assert "HTTP     http://127.0.0.1:8000/v1 " in out
    assert "metrics  http://127.0.0.1:9464/metrics\n" in out
    assert "cache    128 tokens " in out


def test_a_cluster_whose_metrics_never_come_is_printed_without_them(capsys):
    slept = []
    assert print_cluster(Served(status(8, ())), slept.append).metrics_addresses == ()
    assert sum(slept) == pytest.approx(20.0)
    out = capsys.readouterr().out
    assert "metrics  none yet: the controller's log tells why\n" in out
    assert "cache    128 tokens " in out


def test_a_node_that_ray_drains_is_shown_with_what_stands_on_it_and_why(capsys):
    print_status(replace(status(8, METRICS), leaving=(("n", math.inf, "no other node has room"), ("m", 0.0, ""))))
    out = capsys.readouterr().out
    assert "Ray drains node n; on it: attention replica r; no other node has room\n" in out
    assert "Ray drains node m, which ends in 0 s; on it: no shard and no replica\n" in out


def test_no_line_of_a_table_ends_with_spaces_in_a_pipe(capsys):
    print_findings([Finding("Ray", "2.49", ""), Finding("kernels", "not built", "build them: pip install -e .")])
    print_placement(status(8, METRICS))
    print_status(status(8, METRICS))
    lines = capsys.readouterr().out.split("\n")
    assert len(lines) > 10
    assert [line for line in lines if line != line.rstrip()] == []
    assert any("build them" in line for line in lines)
