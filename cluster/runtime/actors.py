"""Only a name: Ray and processes of other versions know these actors by this module (`cluster/evolving.py`)."""

from cluster.runtime.workers.engine_actor import EngineActor
from cluster.runtime.workers.shard_actor import ExpertShardActor

__all__ = ["EngineActor", "ExpertShardActor"]
