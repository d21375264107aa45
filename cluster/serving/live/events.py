"""Notes the changes between one status of a cluster and the next: faults, moves, parts that come and go.

Told of every status, whether anyone watches or not, so that a watcher sees the minutes before. A watcher may be any
client of the server, so all texts are made `public`.
"""

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

from cluster.experts import eplb
from cluster.experts.placement import PlacementPlan
from cluster.serving.live.public import public
from cluster.status import ClusterStatus

Kind = Literal["fault", "move", "up", "change"]
MAX_EVENTS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """at: seconds of the wall clock.  number: counts all events of this process."""

    number: int
    at: float
    kind: Kind
    text: str


class Events:
    """The latest changes, oldest first. For one thread."""

    def __init__(self) -> None:
        self._latest: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._number = 0
        self._before: ClusterStatus | None = None
        self._up: set[str] = set()
        self._fault_at = 0.0

    @property
    def latest(self) -> tuple[Event, ...]:
        return tuple(self._latest)

    def observe(self, status: ClusterStatus, now: float) -> None:
        """now: seconds of the wall clock."""
        faults = [fault for fault in status.faults if fault.at > self._fault_at]
        for fault in faults:
            self._fault_at = max(self._fault_at, fault.at)
            self._note(fault.at, "fault", fault.what)
        up = _parts_up(status)
        before, self._before, was_up, self._up = self._before, status, self._up, up
        if before is None:
            return
        for part in sorted(up - was_up):
            self._note(now, "up", f"{part} is up")
        for part in sorted(was_up - up):
            if not any(fault.what.startswith(f"{part} ") for fault in faults):
                self._note(now, "change", f"{part} is gone")
        if status.work and status.work != before.work:
            self._note(now, "change", status.work)
        if before.plan is not None and status.plan is not None and before.plan.epoch != status.plan.epoch:
            for text in _moves(before.plan, status.plan):
                self._note(now, "move", text)

    def _note(self, at: float, kind: Kind, text: str) -> None:
        self._number += 1
        self._latest.append(Event(number=self._number, at=at, kind=kind, text=public(text)))


def _parts_up(status: ClusterStatus) -> set[str]:
    shards = {f"shard {shard.shard_id}" for shard in status.shards if shard.state == "up"}
    replicas = {
        f"attention replica {replica.process.slot}"
        for replica in status.replicas
        if replica.engine is not None and replica.stats is not None
    }
    return shards | replicas


def _moves(old: PlacementPlan, new: PlacementPlan) -> Iterable[str]:
    """A line for each way that experts took: moved from one shard to another, copied, a copy dropped."""
    if old.num_experts != new.num_experts:
        return
    moved = eplb.moves(old, new)
    places: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
    for side, copies in enumerate((moved.dropped, moved.added)):
        for copy in copies:
            places.setdefault((copy.layer_id, copy.expert_id), ([], []))[side].append(copy.shard_id)
    ways: Counter[tuple[int | None, int | None]] = Counter()
    for dropped, added in places.values():
        ways.update(zip_longest(dropped, added))
    for (source, sink), number in sorted(ways.items(), key=lambda way: -way[1]):
        experts = f"{number} experts" if number > 1 else "1 expert"
        if source is None:
            yield f"{experts} copied to shard {sink}"
        elif sink is None:
            yield f"{experts}: the copy on shard {source} dropped"
        else:
            yield f"{experts} moved from shard {source} to shard {sink}"
