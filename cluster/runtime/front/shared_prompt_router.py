"""Serve's choice of an attention replica for a request. Serve sends this module by value to all ingresses, those of an
older version too: it imports nothing of this package.
"""

import random

from ray.serve.request_router import (
    FIFOMixin,
    LocalityMixin,
    MultiplexMixin,
    PendingRequest,
    RequestRouter,
    RunningReplica,
)


class SharedPromptRouter(FIFOMixin, LocalityMixin, MultiplexMixin, RequestRouter):  # type: ignore[misc]  # Ray has no types
    """Chooses of two random replicas the one with fewer requests under way, as Serve's default does; a request that
    names a replica, which has its prompt in the cache, goes there while that one has a free seat.

    The name comes as the call's `multiplexed_model_id`, by which `FIFOMixin` also matches waiting requests.
    """

    def initialize_state(self, *, max_num_seqs: int) -> None:
        """max_num_seqs: seats, sequences that a replica computes at a time; one more would wait there."""
        self._max_num_seqs = max_num_seqs

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Returns groups of replicas; Serve takes the least busy one of the first group that is not full."""
        nearby = [self.curr_replicas[name] for name in self.apply_locality_routing(pending_request)]
        chosen = random.sample(nearby, min(2, len(nearby)))
        wanted = pending_request.metadata.multiplexed_model_id if pending_request is not None else ""
        named = [replica for replica in candidate_replicas if replica.replica_id.unique_id == wanted]
        return [[replica for replica in named if self._has_seat(replica)], chosen]

    def _has_seat(self, replica: RunningReplica) -> bool:
        """Whether it has one, as far as is known: requests that this process sent count at once, others when Serve
        asks for their number."""
        num_requests = self.replica_queue_len_cache.get(replica.replica_id)
        return num_requests is None or num_requests < self._max_num_seqs
