"""Shards that send rows back unchanged, to measure a carrier without any product."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import torch

from cluster.errors import ShardUnavailable
from cluster.experts.transport import ExpertBatch, ExpertTransport
from cluster.runtime.process import prepare_process, process_info
from cluster.runtime.start.local_ray import start_ray
from cluster.runtime.workers.computing import prepare_to_compute
from cluster.runtime.workers.transports import RayOffers, RayTransport, decode, to_bytes
from cluster.stream.client import StreamTransport
from cluster.stream.frames import StreamOffer
from cluster.stream.server import StreamServer

_TIMEOUT_S = 30.0


class EchoActor:
    """Speaks the protocol of an expert shard, over both carriers."""

    def __init__(self) -> None:
        prepare_process()
        prepare_to_compute(1)
        self.device = torch.device("cpu")
        self._streams = StreamServer(self, host=ray.util.get_node_ip_address(), node=process_info().node_id)
        self._streams.start()

    def forward(self, *wire: Any) -> Any:
        """A `WireBatch` of a Ray call, or a batch of the stream."""
        if isinstance(wire[0], ExpertBatch):
            return wire[0].hidden_states
        return to_bytes(decode(wire, self.device).hidden_states)

    def stream_offer(self) -> StreamOffer:
        return self._streams.offer


class _Handles:
    def __init__(self, actors: list[Any]) -> None:
        self._actors = actors

    def handle(self, shard_id: int) -> Any:
        if shard_id >= len(self._actors):
            raise ShardUnavailable(f"there is no echo {shard_id}", shard_id)
        return self._actors[shard_id]

    def takes_traces(self, shard_id: int) -> bool:
        return False


@contextmanager
def echo_transports(num_shards: int, ray_address: str | None = None) -> Iterator[dict[str, ExpertTransport]]:
    """Every carrier to the same `num_shards` echoes.

    ray_address: a running Ray, which may put the echoes on other hosts; None starts one of this machine, where TCP uses
    loopback.
    """
    connected = start_ray(num_cpus=num_shards, address=ray_address)
    try:
        actors = [ray.remote(EchoActor).options(num_cpus=1).remote() for _ in range(num_shards)]
        handles = _Handles(actors)
        offers, here = RayOffers(handles), process_info().node_id
        carriers: dict[str, ExpertTransport] = {"ray": RayTransport(handles)}
        nodes = {offer.node for offer in ray.get([actor.stream_offer.remote() for actor in actors])}
        if nodes == {here}:
            carriers["stream, one host"] = StreamTransport(offers, node=here, fallback=None, timeout_s=_TIMEOUT_S)
        carriers["stream, TCP"] = StreamTransport(offers, node="", fallback=None, timeout_s=_TIMEOUT_S)
        yield carriers
    finally:
        connected.stop()
