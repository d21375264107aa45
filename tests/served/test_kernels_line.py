"""Each process that computes names its kernels in its first log line."""

import re
from pathlib import Path

import pytest

from cluster.kernels.native.library import native

pytestmark = pytest.mark.ray


def test_engines_and_shards_begin_their_logs_with_their_kernels(served, ray_cluster):
    status = served.status()
    pids = [replica.process.pid for replica in status.replicas] + [shard.process.pid for shard in status.shards]
    assert len(pids) == 4
    [session] = {Path(node["RayletSocketName"]).parents[1] for node in ray_cluster.nodes()}
    for pid in pids:
        text = "".join(path.read_text() for path in session.glob(f"logs/worker-*-{pid}.err"))
        ours = re.findall(r"^\d{4}-\d\d-\d\d \S+ (\w+) cluster\.\S+: (.*)$", text, flags=re.MULTILINE)
        if native() is None:
            assert ours[0][1].startswith("kernels: torch's alone")
        else:
            assert ours[0] == ("INFO", f"kernels: native {native().variant}")
        assert sum(line.startswith("kernels:") for _, line in ours) == 1
