"""The Serve deployment before an engine: it hands requests in, and each step's updates out to their streams."""

import asyncio
import contextvars
import logging
import os
import signal
from collections.abc import AsyncGenerator, Iterable
from contextlib import AbstractContextManager, aclosing, nullcontext, suppress
from typing import Any

import ray
from ray import serve
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.config import ClusterConfig
from cluster.engine.step_record import make_step_record
from cluster.errors import InvalidRequest, ReplicaStopping, ReplicaUnavailable, SetupError
from cluster.logs import SeldomLog
from cluster.process_identity import identity, is_alive
from cluster.runtime.control.controller import get_controller
from cluster.runtime.deaths import Pauses
from cluster.runtime.front.autoscaling import engine_load
from cluster.runtime.front.prefix_news import PrefixNews
from cluster.runtime.front.traces import replica_spans
from cluster.runtime.names import shard_group
from cluster.runtime.process import actor_environment, num_threads, prepare_process
from cluster.runtime.ray_private.core import by_name
from cluster.runtime.workers.engine_actor import ENGINE_GROUPS, EngineActor
from cluster.runtime.workers.protocol import LONG_POLL_S
from cluster.serving.update_queue import UpdateQueue, follow
from cluster.types import EngineRequest, SequenceUpdate

log = logging.getLogger(__name__)
seldom = SeldomLog(log)

LOST = "the attention replica of this request lost its engine"
HUNG_S = LONG_POLL_S + 10.0  # a healthy engine answers a poll within LONG_POLL_S; one that takes this long hangs
TAKEN_S = 2.0  # all streams take their ends within this time
LAST_WORDS_S = 0.2  # then the ends leave the process within this time
FLUSH_S = 1.5  # for the last spans of a replica that is told to end, and of its engine


class AttentionReplica:
    """Owns one engine, which dies with it. Serve makes any number of these."""

    async def __init__(self, config: ClusterConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        prepare_process()
        self.name = serve.get_replica_context().replica_id.unique_id
        group = shard_group(config)
        threads = num_threads(config.cpus_per_attention_replica)
        self._record = make_step_record(config.max_num_seqs)
        record_path = self._record.path if self._record is not None else ""
        self.engine = (
            ray.remote(concurrency_groups=ENGINE_GROUPS)(by_name(EngineActor))
            .options(
                num_cpus=config.cpus_per_attention_replica,
                num_gpus=config.gpus_per_attention_replica or 0,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    get_current_placement_group(), placement_group_bundle_index=0
                ),
                runtime_env=actor_environment(group, threads),
            )
            .remote(config, self.name, get_controller(group, config), threads, record_path)
        )
        # Ray cancels what a cancelled request called, and a cancelled call holds up all later ones of its caller to
        # the same actor for 30 s (Ray 2.60): calls to the engine are made in the replica's name, not in a request's.
        self._context = contextvars.copy_context()
        self._tracing = replica_spans(config, self.name)
        try:
            self._engine_process = identity(await self.engine.ready.remote())  # on this node, as are all of a replica
        except ray.exceptions.RayActorError as error:
            raise SetupError(f"attention replica {self.name}: the engine did not start: {error}") from error
        self._streams: dict[str, UpdateQueue] = {}
        self._prefixes = PrefixNews()
        self._lost = ""
        self._max_num_seqs = config.max_num_seqs
        self._max_unread_bytes = config.max_unread_bytes
        self._pump = asyncio.create_task(self._share_out())
        log.info("attention replica %s is up", self.name)

    async def ready(self) -> None:
        """Returns when the engine has its weights; Serve lets no call in before."""

    async def generate(self, request: EngineRequest) -> AsyncGenerator[SequenceUpdate, None]:
        """Yields the replica's name and news, then the sequence's updates, the last with a finish_reason. Closing it
        cancels the sequence."""
        with self._traced(request) as traced:
            news = self._prefixes.taken(request)
            yield SequenceUpdate(request_id=request.request_id, replica=self.name, prefixes=news)
            refusal = self._refusal(request)
            if refusal is not None:
                yield SequenceUpdate(request_id=request.request_id, finish_reason="error", error=refusal)
                return
            updates = follow(
                request.request_id,
                self._streams,
                self._max_unread_bytes,
                submit=lambda: self._context.run(self.engine.submit.remote, [traced]),
                cancel=lambda: self._context.run(self.engine.cancel.remote, [request.request_id]),
            )
            output_token_ids: list[int] = []
            try:
                async with aclosing(updates):
                    async for update in updates:
                        output_token_ids += update.token_ids
                        yield update
            finally:
                self._prefixes.answered(request, output_token_ids)

    async def __del__(self) -> None:
        """Serve calls it after this replica's last call: the engine ends behind it."""
        if self._tracing is not None:
            of_engine = _as_future(self._context.run(self.engine.flush_traces.remote))
            with suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_S):
                    await asyncio.gather(of_engine, self._flush_traces(), return_exceptions=True)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve calls this where it scales by load."""
        stats = await _as_future(self._context.run(self.engine.stats.remote))
        return engine_load(stats, self._max_num_seqs)

    def check_health(self) -> None:
        """Serve calls this, and replaces a replica whose engine is gone."""
        if self._lost:
            raise RuntimeError(self._lost)

    def _traced(self, request: EngineRequest) -> AbstractContextManager[EngineRequest]:
        return nullcontext(request) if self._tracing is None else self._tracing.request(request)

    async def _flush_traces(self) -> None:
        """Of this process."""
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.flush)

    def _refusal(self, request: EngineRequest) -> Exception | None:
        if self._lost:
            return ReplicaStopping(self._lost)
        if request.request_id in self._streams:
            return InvalidRequest(f"request_id {request.request_id!r} is that of a running request", "request_id")
        return None

    def _share(self, updates: Iterable[SequenceUpdate]) -> None:
        """Gives each stream its update; ends a stream whose client reads too slowly, at the engine too."""
        for update in updates:
            stream = self._streams.get(update.request_id)
            if stream is not None and not stream.put(update) and update.finish_reason is None:
                seldom.warning("a stream ends, its client reads too slowly (request id %s here)", update.request_id)
                self._context.run(self.engine.cancel.remote, [update.request_id])

    async def _share_out(self) -> None:
        """Asks the engine for each step's message until the engine has died; then ends this process."""
        received, pauses = 0, Pauses()
        while not self._lost:
            news = asyncio.ensure_future(_as_future(self.engine.poll.remote(LONG_POLL_S, received)))
            if not (await asyncio.wait([news], timeout=HUNG_S))[0]:
                self._lost = f"the engine of attention replica {self.name} answers nothing for {HUNG_S:g} s"
                break
            try:
                received, updates = news.result()
            except ray.exceptions.RayError as error:
                # Ray tells no death while its GCS is away.
                unreachable = isinstance(error, ray.exceptions.ActorUnavailableError)
                if not unreachable or not is_alive(self._engine_process):
                    self._lost = f"the engine of attention replica {self.name} is gone: {error}"
                    break
                log.info("attention replica %s asks its engine again: %s", self.name, type(error).__name__)
                await pauses.pause()
            else:
                pauses.over()
                self._share(updates)
        log.error("%s", self._lost)
        if is_alive(self._engine_process):
            os.kill(self._engine_process[0], signal.SIGKILL)  # Ray cannot end a stopped process
        await self._say_last_words()
        os._exit(1)  # Serve notices at once and makes another; its next health check would be seconds away

    async def _say_last_words(self) -> None:
        """Ends all streams. Their requests go on at other replicas, those of the engine's last step with more care."""
        for request_id, stream in self._streams.items():
            num_in_step = self._record.num_beside(request_id) if self._record is not None else None
            if num_in_step:
                log.error("the engine computed request %s when it died, of %d in the step", request_id, num_in_step)
            died = ReplicaUnavailable(LOST, num_in_step)
            stream.put(SequenceUpdate(request_id=request_id, finish_reason="error", error=died))
        with suppress(TimeoutError):
            async with asyncio.timeout(TAKEN_S):
                while self._streams:
                    await asyncio.sleep(0.01)
        await asyncio.gather(asyncio.sleep(LAST_WORDS_S), self._flush_traces())


async def _as_future(ref: Any) -> Any:
    return await ref
