"""How rows reach a shard in its process: by Ray's calls and by its stream. Torch loads with this module."""

import time
from typing import Any

import ray
import torch

from cluster.experts.pulse import Pulse
from cluster.metrics import ShardMetrics, new_registry, report_version
from cluster.runtime.process import process_info
from cluster.runtime.workers.rehearsal import Rehearsal
from cluster.runtime.workers.shard_server import ShardServer
from cluster.runtime.workers.transports import decode, to_bytes, trace_of
from cluster.stream.server import StreamServer


def make_server(shard_id: int, rehearsal: Rehearsal) -> ShardServer:
    """With metrics of its own."""
    return ShardServer(shard_id, ShardMetrics(report_version(new_registry(), "shard"), shard_id), rehearsal)


def forward(server: ShardServer, pulse: Pulse, wire: tuple[Any, ...]) -> bytes:
    """As `ExpertShardActor.forward`."""
    device, trace = server.shard().device, trace_of(wire)
    began = time.time_ns()
    waited_s = max(0.0, began / 1e9 - wire[0])  # hosts' clocks may differ
    pulse.begin(on_cpu=device.type == "cpu")
    try:
        out = to_bytes(server.compute(decode(wire, device), waited_s))
    finally:
        pulse.end()
    if trace:
        server.tracing.computed(trace, began, [(wire[4], waited_s, (time.time_ns() - began) / 1e9)])
    return out


def start_stream(server: ShardServer, pulse: Pulse) -> StreamServer:
    """The experts have to be loaded."""
    streams = StreamServer(
        _Computer(server, server.shard().device),
        host=ray.util.get_node_ip_address(),
        node=process_info().node_id,
        pulse=pulse,
        steady=server,
        on_traced=server.tracing.computed,
    )
    streams.start()
    return streams


class _Computer:
    """A shard's stream computes with it."""

    def __init__(self, server: ShardServer, device: torch.device) -> None:
        self.device = device
        self.forward = server.compute
