"""The ranks from 1 on of an attention replica: Ray actors in the placement group of their engine, which is rank 0.

An engine ends with any of its ranks, so that the whole replica is replaced; its ranks end with it, their owner.
"""

import logging
import os
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.config import ClusterConfig
from cluster.runtime.names import shard_group
from cluster.runtime.process import actor_environment, end_at_sigterm, prepare_process
from cluster.runtime.ray_private.core import by_name

if TYPE_CHECKING:
    import torch

    from cluster.engine.group import Group

log = logging.getLogger(__name__)


class RankActor:
    """Its calls are made one after another: `pid`, `load`, `follow`."""

    def __init__(self, rank: int) -> None:
        prepare_process()
        end_at_sigterm()
        self._rank = rank
        self._loaded: Any = None

    def pid(self) -> int:
        return os.getpid()

    def load(self, config: ClusterConfig, num_threads: int) -> None:
        """Blocks. Raises CheckpointError, SetupError."""
        from cluster.engine.follower import LoadedRank  # torch, which only such a process needs
        from cluster.runtime.workers.computing import prepare_to_compute

        prepare_to_compute(num_threads)
        self._loaded = LoadedRank(config.model, config.engine(), self._rank)

    def follow(self, meeting: str, size: int, num_sharers: int) -> None:
        """Computes its part of each step, and ends the process when rank 0 is gone, or when it fails itself."""
        from cluster.engine.group import Group
        from cluster.errors import Unavailable

        try:
            self._loaded.follow(lambda device: Group(Path(meeting), self._rank, size, device), num_sharers)
        except Unavailable as error:
            log.info("rank %d ends: %s", self._rank, error)
        except Exception:
            log.exception("rank %d ends", self._rank)
        os._exit(1)


class ActorRanks:
    """The `OtherRanks` of an engine's process."""

    def __init__(self, config: ClusterConfig, num_threads: int, num_sharers: int) -> None:
        """Starts them; each begins to load. num_threads: of each.  num_sharers: as of `load_engine`."""
        self._size, self._num_sharers = config.tensor_parallel_size, num_sharers
        placement = get_current_placement_group()
        actor_class = ray.remote(by_name(RankActor))
        self._actors = [
            actor_class.options(
                num_cpus=config.cpus_per_attention_replica,
                num_gpus=config.gpus_per_attention_replica or 0,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=rank),
                runtime_env=actor_environment(shard_group(config), num_threads),
            ).remote(rank)
            for rank in range(1, self._size)
        ]
        self._pids = [actor.pid.remote() for actor in self._actors]
        self._loads = [actor.load.remote(config, num_threads) for actor in self._actors]

    def pids(self) -> tuple[int, ...]:
        """Waits until the processes are there."""
        return tuple(ray.get(self._pids))

    def join(self, device: "torch.device") -> "Group":
        """As `OtherRanks.join`. From then on this process ends with any of them."""
        from cluster.engine.group import Group

        ray.get(self._loads)
        with tempfile.TemporaryDirectory(prefix="moe-cluster-ranks-") as folder:
            meeting = Path(folder) / "meeting"
            follows = [actor.follow.remote(str(meeting), self._size, self._num_sharers) for actor in self._actors]
            threading.Thread(target=_end_with, args=(follows,), name="ranks", daemon=True).start()
            return Group(meeting, 0, self._size, device)


def _end_with(follows: list[Any]) -> None:
    """Ends this process once one of the calls is over."""
    ended, _ = ray.wait(follows, num_returns=1)
    log.error("rank %d of this engine is gone: the engine ends", 1 + follows.index(ended[0]))
    os._exit(1)
