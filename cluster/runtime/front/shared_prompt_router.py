"""Serve's choice of an attention replica for a request. Serve sends this module by value to all ingresses, those of an
older version too: it imports nothing of this package.
"""

import random
from typing import Any

from ray.serve.request_router import FIFOMixin, LocalityMixin, PendingRequest, RequestRouter, RunningReplica


class SharedPromptRouter(FIFOMixin, LocalityMixin, RequestRouter):  # type: ignore[misc]  # Ray has no types
    """Chooses of two random replicas the one with fewer requests under way, as Serve's default does; a request that
    names replicas, which have its prompt or its beginning in the cache, goes to the first one that has a free seat and
    is not too busy.

    The names come as the call's `session_id`, words as `a+3`: that replica may have 3 requests more than the one of the
    two; without a number any that leaves it a free seat. An ingress of an older version gives one as the
    `multiplexed_model_id`; Serve keeps all such requests until that ingress ends.
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
        wanted = _wanted(pending_request.metadata) if pending_request is not None else ""
        if not wanted:
            return [chosen]
        named = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        least = min(map(self._num_requests, chosen), default=0)
        for word in wanted.split():
            name, _, excess = word.partition("+")
            most = min(self._max_num_seqs - 1, least + int(excess)) if excess else self._max_num_seqs - 1
            if name in named and self._num_requests(named[name]) <= most:
                return [[named[name]], chosen]
        return [chosen]

    def _get_pending_request_matching_metadata(self, request_metadata: Any = None) -> PendingRequest | None:
        """Returns the waiting request that gets a replica chosen for this one: the first that wants the same.

        `FIFOMixin` asks. Without it Serve looks for the request's id, which all answers to one prompt have in common:
        one of them would get its replica, the others would wait for ever.
        """
        if request_metadata is None:
            return None
        wanted = _wanted(request_metadata)
        waiting = (each for each in self._pending_requests_to_fulfill if not each.future.done())
        return next((each for each in waiting if _wanted(each.metadata) == wanted), None)

    def _num_requests(self, replica: RunningReplica) -> int:
        """As far as is known: requests that this process sent count at once, others when Serve asks for their
        number."""
        return self.replica_queue_len_cache.get(replica.replica_id) or 0


def _wanted(metadata: Any) -> str:
    """The replicas that a request names."""
    return str(metadata.session_id or metadata.multiplexed_model_id)
