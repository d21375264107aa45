"""An `LLM`'s experts on actors that a test module shares: each model is loaded anew, no cluster is started for it."""

import ray

from cluster.checkpoint.reader import CheckpointReader
from cluster.experts.dispatch import ExpertDispatcher
from cluster.experts.placement import plan_evenly
from cluster.experts.routing import FixedPlan
from cluster.runtime.process import process_info
from cluster.runtime.workers.transports import RayOffers, RayTransport
from cluster.stream.client import StreamTransport


class Handles:
    def __init__(self, actors):
        self.actors = actors

    def handle(self, shard_id):
        return self.actors[shard_id]


class ActorExperts:
    """In the place of an `LLM`'s `RayExperts`."""

    def __init__(self, actors, config, metrics):
        model = CheckpointReader(config.model).config
        plan = plan_evenly(model.sparse_layers, model.num_experts, config.expert_shards)
        dtype = model.dtype if config.dtype == "auto" else config.dtype
        loads = [
            actor.load.remote(config.model, dict(experts), dtype, "cpu")
            for actor, experts in zip(actors, plan.slices, strict=True)
        ]
        ray.get(loads)
        handles, node = Handles(actors), process_info().node_id
        self._transport = (
            RayTransport(handles)
            if config.transport == "ray"
            else StreamTransport(RayOffers(handles), node=node, fallback=None, timeout_s=30.0)
        )
        self.dispatcher = ExpertDispatcher(self._transport, FixedPlan(plan), metrics)

    def adapt(self, wanted):
        assert not wanted.adapters

    def close(self):
        self._transport.close()
