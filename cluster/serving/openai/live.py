"""`/cluster`: the cluster at a moment; `/cluster/live`: the same as it changes, as server-sent events."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter
from fastapi.responses import Response

from cluster.serving.live.beat import Beat
from cluster.serving.live.feed import LiveFeed
from cluster.serving.live.picture import ClusterPicture, PlacementPicture
from cluster.serving.openai.base_schema import AnswerBody
from cluster.serving.openai.served import Served
from cluster.serving.openai.sse import MEDIA_TYPE, begun, event_text

WATCHED = frozenset({"/cluster/live"})
MAX_WATCH_S = 60.0  # then a watcher comes again, perhaps to a newer process: an ingress ends when its calls have


class Snapshot(AnswerBody):
    cluster: ClusterPicture
    placement: PlacementPicture | None
    beat: Beat


def router(served: Served) -> APIRouter:
    routes, feed = APIRouter(tags=["cluster"]), served.live
    if feed is None:
        return routes

    @routes.get("/cluster", responses={200: {"model": Snapshot}})
    async def snapshot() -> Response:
        """The parts of the cluster, the placement of its experts, and its load."""
        frame = await feed.now()
        text = f'{{"cluster":{frame.cluster},"placement":{frame.placement},"beat":{frame.beat}}}'
        return Response(text, media_type="application/json")

    @routes.get("/cluster/live", responses={200: {"content": {MEDIA_TYPE: {}}}})
    async def live() -> Response:
        """Events `cluster` and `placement` when these have changed, and `beat` twice a second. It ends after a minute:
        come again."""
        return await begun(_events(feed, served), served.service.new_request_id())

    return routes


async def _events(feed: LiveFeed, served: Served) -> AsyncGenerator[str, None]:
    until, cluster, placement = time.monotonic() + MAX_WATCH_S, "", ""
    async with aclosing(feed.frames()) as frames:
        async for frame in frames:
            if frame.cluster != cluster:
                cluster = frame.cluster
                yield event_text(cluster, "cluster")
            if frame.placement != placement:
                placement = frame.placement
                yield event_text(placement, "placement")
            yield event_text(frame.beat, "beat")
            if time.monotonic() > until or served.service.admission.draining:
                return
