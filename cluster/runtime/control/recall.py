"""Reads the record that an earlier controller of a group left with its shards."""

import asyncio
import logging

import ray

from cluster.runtime.control.launcher import Launcher
from cluster.runtime.workers.protocol import NO_SHARD, ClusterRecord

log = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 5.0


async def recall(launcher: Launcher) -> tuple[ClusterRecord | None, dict[int, str]]:
    """The newest record, if any, and the names of the shards' actors by shard. Ends spare processes: nobody knows
    them any more."""
    records: list[ClusterRecord] = []
    actors: dict[int, str] = {}
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
        actors[shard_id] = name
        records += [] if record is None else [record]
    return max(records, key=lambda record: record.version, default=None), actors
