"""Reads the record that an earlier controller of a group left with its shards, and finds what it left running."""

import asyncio
import logging
from collections import defaultdict
from typing import Any, NamedTuple

import ray

from cluster.runtime.control.launcher import Launcher
from cluster.runtime.names import shard_of
from cluster.runtime.workers.protocol import NO_SHARD, ClusterRecord

log = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 5.0


class Left(NamedTuple):
    """Of one shard: the names of its actor and of its place; "" for none."""

    actor: str = ""
    place: str = ""


class _Found(NamedTuple):
    """version: of the record that it has, before all others where it has none."""

    version: float
    name: str
    actor: Any


async def recall(group: str, launcher: Launcher) -> tuple[ClusterRecord | None, dict[int, Left]]:
    """The newest record, if any, and what is left of each shard. Ends spare processes: nobody knows them any more; and
    of a shard that had two processes, since it was being moved, the one that no plan was published with last."""
    records: list[ClusterRecord] = []
    found: dict[int, list[_Found]] = defaultdict(list)
    for name, actor in await launcher.in_thread(launcher.named):
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                shard_id, record = await actor.which.remote(), await actor.recall.remote()
        except (TimeoutError, ray.exceptions.RayError) as error:
            log.warning("%s does not answer: %r", name, error)
            continue
        if shard_id == NO_SHARD:
            launcher.end(actor)
            continue
        found[shard_id].append(_Found(-1.0 if record is None else record.version, name, actor))
        records += [] if record is None else [record]
    places: dict[int, list[str]] = defaultdict(list)
    nodes = await launcher.in_thread(launcher.places)
    for name in nodes:
        places[shard_of(group, name)].append(name)
    left = {}
    for shard_id in sorted({*found, *places}):
        newest_first = sorted(found[shard_id], key=lambda f: f.version, reverse=True)
        for other in newest_first[1:]:
            launcher.end(other.actor)
        kept = newest_first[0] if newest_first else None
        place = await _place(kept, places[shard_id], nodes)
        for name in {*places[shard_id]} - {place}:
            await launcher.in_thread(launcher.give_back, name)
        left[shard_id] = Left("" if kept is None else kept.name, place)
    return max(records, key=lambda record: record.version, default=None), left


async def _place(found: _Found | None, names: list[str], nodes: dict[str, str]) -> str:
    """The one of a shard's places that is its process's; "" for none."""
    if len(names) < 2 or found is None:
        return names[0] if names else ""
    if found.name in names:
        return found.name
    try:  # it was a spare process
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            node_id = (await found.actor.process.remote()).node_id
    except (TimeoutError, ray.exceptions.RayError):
        return names[0]
    return next((name for name in names if nodes[name] == node_id), names[0])
