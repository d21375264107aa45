"""The Serve deployment that clients reach: it takes gRPC and HTTP calls, gets tokens from a replica, and sends text."""

import asyncio
import contextvars
import logging
import math
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import grpc
import ray
from ray import serve
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from cluster.checkpoint.generation import read_sampling_defaults
from cluster.checkpoint.info import model_info
from cluster.checkpoint.model_files import model_directory
from cluster.config import ClusterConfig
from cluster.errors import ClusterError, Overloaded, ReplicaStopping, ReplicaUnavailable
from cluster.metrics import IngressMetrics, new_registry, report_version
from cluster.runtime.control.controller import get_controller
from cluster.runtime.deaths import until_dead
from cluster.runtime.front.admitting import make_admission
from cluster.runtime.front.gateways import gateway_view
from cluster.runtime.front.live import RayLiveSource
from cluster.runtime.front.node_metrics import NodeScraper
from cluster.runtime.front.operations import RayOperations
from cluster.runtime.front.prefix_balancer import PrefixBalancer
from cluster.runtime.front.prompt_groups import PromptGroups
from cluster.runtime.front.shared_responses import response_store
from cluster.runtime.front.traces import request_spans
from cluster.runtime.gcs import GcsThread
from cluster.runtime.names import shard_group
from cluster.runtime.process import prepare_process
from cluster.runtime.ray_private.serve import RAY_SERVE_ENABLE_DIRECT_INGRESS
from cluster.serving.grpc.handlers import GrpcInferenceService
from cluster.serving.grpc.health import GrpcHealthService
from cluster.serving.grpc.kserve.handlers import KServeService
from cluster.serving.grpc.vllm.engine import VllmEngineService
from cluster.serving.health import HealthState
from cluster.serving.live.feed import LiveFeed
from cluster.serving.openai.app import make_app, no_api
from cluster.serving.openai.responses.background import Responses
from cluster.serving.openai.served import Served
from cluster.serving.replay import ReplayingBackend
from cluster.serving.service import InferenceService, ServiceLimits
from cluster.serving.text.tokenizer import Tokenizer
from cluster.serving.tracking import request_log
from cluster.status import ClusterStatus
from cluster.types import EngineRequest, SequenceUpdate

log = logging.getLogger(__name__)

HEALTH_INTERVAL_S = 0.5  # between two looks at replicas and shards
ACCEPT_TIMEOUT_S = 10.0  # a replica answers a new request at once, whether it then waits in a queue or not
FAREWELL_S = 1.0  # in which a replica reports its engine's death itself, and the sequences of the last step
STATUS_TIMEOUT_S = 5.0  # a controller whose host died with Ray's GCS says nothing until it is back
READY_TIMEOUT_S = 5.0  # an attention replica that does not answer for so long does not count as up


class ServeReplicas:
    """A generation backend: `SharedPromptRouter` chooses the replica with fewer requests under way, or one that has the
    prompt or its beginning.

    Updates come over Serve's gRPC between deployments (1.45 times the tokens/s of its calls through Ray). A connection
    does not show that a host is gone: `watch` waits until Ray reports an engine's death, and ends its streams.
    """

    def __init__(self, replicas: DeploymentHandle, balancer: PrefixBalancer) -> None:
        self._generate = replicas.generate.options(stream=True, _by_reference=False)
        self._ready = replicas.ready
        self._groups = PromptGroups()
        self._balancer = balancer
        self._engines: dict[str, Any] = {}
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._running: dict[str, set[Any]] = {}  # replica -> Serve's responses
        self._lost: set[Any] = set()
        self._context = contextvars.copy_context()  # for calls that are not cancelled with their request

    @property
    def num_engines(self) -> int:
        return len(self._engines)

    def watch(self, engines: Mapping[str, Any]) -> None:
        """engines: of all replicas by name, as the controller last reported them."""
        self._engines = dict(engines)
        self._balancer.serve(engines)
        for name, engine in engines.items():
            if name not in self._watchers:
                self._watchers[name] = asyncio.create_task(self._await_death(name, engine))

    async def _await_death(self, name: str, engine: Any) -> None:
        await until_dead(engine, f"the engine of attention replica {name}")
        await asyncio.sleep(FAREWELL_S)
        del self._watchers[name]
        for response in self._running.pop(name, ()):
            self._lost.add(response)
            response.cancel()

    async def generate(self, request: EngineRequest) -> AsyncGenerator[SequenceUpdate, None]:
        """Raises Overloaded, ReplicaStopping, ReplicaUnavailable. Closing it cancels the sequence on its replica."""
        try:
            async with aclosing(self._updates(request)) as updates:
                async for update in updates:
                    if update.error is not None:
                        self._groups.forget(request.prompt_group)
                    yield update
        except ClusterError:
            self._groups.forget(request.prompt_group)
            raise

    async def _updates(self, request: EngineRequest) -> AsyncGenerator[SequenceUpdate, None]:
        choice = self._balancer.choose(request)
        wanted = self._groups.replica_of(request.prompt_group) or choice.wanted
        call = self._generate.options(session_id=wanted) if wanted else self._generate
        response, replica, ended = call.remote(choice.request), "", False
        try:
            async with asyncio.timeout(ACCEPT_TIMEOUT_S):
                first = await anext(response)
                replica = first.replica
            self._running.setdefault(replica, set()).add(response)
            self._groups.taken(request.prompt_group, replica)
            self._balancer.taken(choice, replica, first.prefixes)
            async for update in response:
                choice.output_token_ids += update.token_ids
                ended = update.finish_reason is not None
                yield update
        except BackPressureError as error:
            raise Overloaded("all attention replicas have as many requests as they take: try again later") from error
        except (ray.exceptions.RayActorError, RayServeException, grpc.aio.AioRpcError) as error:
            raise ReplicaUnavailable("the attention replica of this request died") from error
        except TimeoutError as error:
            raise ReplicaStopping(f"no attention replica took this request in {ACCEPT_TIMEOUT_S:g} s") from error
        except asyncio.CancelledError as error:
            if response not in self._lost:
                raise
            raise ReplicaUnavailable("the attention replica of this request is gone, with its host") from error
        except ray.exceptions.RayTaskError as error:
            raise ClusterError(f"the attention replica failed: {error.cause!r}") from error
        finally:
            self._running.get(replica, set()).discard(response)
            self._lost.discard(response)
            self._balancer.ended(choice)
            if not ended:
                response.cancel()
                # Serve's cancel can miss a request that is just being handed over; engines cancel it by its id.
                for engine in self._engines.values():
                    self._context.run(engine.cancel.remote, [request.request_id])

    async def answers(self) -> bool:
        """Whether some replica is up."""
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                await self._ready.remote()
        except (TimeoutError, ray.exceptions.RayError, RayServeException):
            return False
        return True


@serve.ingress()
class Ingress(GrpcInferenceService, VllmEngineService, KServeService, GrpcHealthService):
    """Knows all replicas. Serve makes any number of these."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: ClusterConfig, replicas: DeploymentHandle
    ) -> None:
        prepare_process()
        request_log.setLevel(logging.INFO if config.log_requests else logging.WARNING)
        self._config = config
        self._controller = get_controller(shard_group(config), config)
        self._controller.apply.remote(config)
        metrics = IngressMetrics(report_version(new_registry(), "ingress"))
        by_prefix = config.balancer == "prefix" and config.enable_prefix_caching
        self._replicas = ServeReplicas(replicas, PrefixBalancer(on=by_prefix, count=metrics.balanced))
        self._admission = make_admission(config, self._room)
        self._adapters: tuple[str, ...] = ()
        self._adapters_version = -1.0
        model_dir = model_directory(config.model)
        defaults = read_sampling_defaults(model_dir)
        self._spans = request_spans(config)
        self._service = InferenceService(
            tokenizer=None if config.skip_tokenizer else Tokenizer(model_dir),
            info=model_info(config.model, config.engine(), config.model_id),
            defaults=defaults,
            backend=ReplayingBackend(
                self._replicas,
                max_replays=config.max_replays,
                room_timeout_s=config.recovery_timeout_s,
                on_replay=metrics.replayed,
            ),
            metrics=metrics,
            limits=ServiceLimits(
                max_request_bytes=config.max_request_bytes, max_waiting_inputs=config.max_waiting_inputs
            ),
            admission=self._admission,
            adapters=lambda: self._adapters,
            spans=self._spans,
        )
        self._gcs, self._health = GcsThread(), HealthState()
        self._responses = Responses(response_store(config, self._gcs))
        self._start = asyncio.create_task(self._service.start())
        self._status: ClusterStatus | None = None
        source = RayLiveSource(shard_group(config), lambda: self._status, self._gcs)
        self._live = LiveFeed(source, self._service.info.model_id)
        raise_failures = not RAY_SERVE_ENABLE_DIRECT_INGRESS
        GrpcInferenceService.__init__(self, self._service, raise_failures=raise_failures)
        GrpcHealthService.__init__(self, self._health, self._admission, raise_failures=raise_failures)
        view = gateway_view(config, model_dir, defaults, self._health, lambda: self._status)
        self.open_vllm_engine(view)
        self.open_kserve(view)
        self._covered = False
        await self._look()  # one that follows a dead one says from its first call on that the cluster serves
        self._watch = asyncio.create_task(self._keep_looking())

    def __serve_build_asgi_app__(self) -> Any:
        """Serve calls it for the application that answers HTTP."""
        if not self._config.http_api:
            return no_api
        metrics = NodeScraper(shard_group(self._config), self._gcs).scrape
        page = self._config.max_watchers > 0
        return make_app(
            Served(
                service=self._service,
                health=self._health,
                metrics=metrics,
                now_s=time.time,
                aliases=self._config.aliases,
                live=self._live if page else None,
                operations=RayOperations(self._controller, lambda: self._status, self._look_twice) if page else None,
                responses=self._responses,
            )
        )

    async def __del__(self) -> None:
        """Serve calls it after this ingress's last call, and waits as long as for calls."""
        await self._responses.drained()
        if self._spans is not None:
            await asyncio.to_thread(self._spans.flush)

    def _room(self) -> float:
        """This ingress's share of the sequences that all engines run and queue; infinite before engines are known."""
        engines = self._replicas.num_engines
        if not engines:
            return math.inf
        config = self._config
        return engines * (config.max_num_seqs + config.max_waiting) / config.ingress_replicas

    async def drain(self) -> int:
        """Refuses new requests from now on; returns the number of those under way."""
        self._admission.drain()
        self._health.set(False)
        return self._admission.num_running + self._responses.num_waiting

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(HEALTH_INTERVAL_S)
            try:
                await self._look()
            except Exception:  # the lease and the health of this ingress hang on the next look
                log.exception("a look at the cluster failed")

    async def _look_twice(self) -> None:
        """A look, and the time in which every other ingress looks as well."""
        await self._look()
        await asyncio.sleep(2 * HEALTH_INTERVAL_S)

    async def _look(self) -> None:
        """Keeps the health current. It is serving once replicas and shards are up, until draining, or until some expert
        has had no copy for longer than its requests wait."""
        try:
            async with asyncio.timeout(STATUS_TIMEOUT_S):
                status = await self._controller.status.remote()
            if status.lease_by_renewal:
                self._controller.renew_lease.remote()
            self._covered = status.serves(self._config.recovery_timeout_s)
            self._status = status
            if status.adapters_version >= self._adapters_version:  # not of a controller that has just begun
                self._adapters, self._adapters_version = status.adapters, status.adapters_version
            self._replicas.watch({r.name: r.engine for r in status.replicas if r.engine is not None})
            if status.draining:
                self._admission.drain()
            self._live.observe(status)
        except (TimeoutError, ray.exceptions.RayError) as error:
            log.warning("the expert controller does not answer, the last state stays: %r", error)
        serving = self._covered and not self._admission.draining and await self._replicas.answers()
        if serving != self._health.serving:
            log.info("health: %s", "SERVING" if serving else "NOT_SERVING")
        self._health.set(serving)
