"""Remembers the replica that has computed the prompt of a group of requests. Knows no Serve."""

MAX_GROUPS = 4096  # remembered at a time; a group's requests come within moments of one another


class PromptGroups:
    """For one event loop. A group is named by its requests' `prompt_group`, "" is none."""

    def __init__(self) -> None:
        self._replicas: dict[str, str] = {}  # the longest known first

    def replica_of(self, group: str) -> str:
        """Returns the name of the replica that the group's next request shall go to; "" for any."""
        return self._replicas.get(group, "")

    def taken(self, group: str, replica: str) -> None:
        """Notes that a replica runs a request of the group; the first one stays the group's."""
        if not group or group in self._replicas:
            return
        while len(self._replicas) >= MAX_GROUPS:
            del self._replicas[next(iter(self._replicas))]
        self._replicas[group] = replica

    def forget(self, group: str) -> None:
        """Notes that a request of the group failed where it ran: the next one goes anywhere."""
        self._replicas.pop(group, None)
