"""Starts and stops: a Ray of this machine, the shards alone (offline), the whole served application."""

import contextlib
import io
import logging
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import gRPCOptions

from cluster.config import ClusterConfig
from cluster.config.environment import DIRECT_ENVIRONMENT
from cluster.config.local_address import leave_address
from cluster.engine.preflight import check_checkpoint
from cluster.errors import SetupError
from cluster.experts.dispatch import ExpertDispatcher
from cluster.experts.transport import ExpertTransport
from cluster.metrics import DispatchMetrics
from cluster.runtime.attention_replica import AttentionReplica
from cluster.runtime.autoscaling import autoscaling_config
from cluster.runtime.controller import get_controller
from cluster.runtime.directory import ShardDirectory
from cluster.runtime.grpc_front import GrpcFront
from cluster.runtime.haproxy import MAX_MESSAGE_BYTES, free_block, local_environment
from cluster.runtime.ingress import Ingress
from cluster.runtime.last_words import why_not_started
from cluster.runtime.local_ray import start_ray
from cluster.runtime.operate import APPLICATION
from cluster.runtime.process import actor_environment, share_of
from cluster.runtime.protocol import NAMESPACE, ClusterStatus, metrics_dir, process_info, shard_group
from cluster.runtime.transports import make_transport
from cluster.serving.api_keys import ApiKeys
from cluster.serving.tokenizer import Tokenizer

log = logging.getLogger(__name__)

GRPC_SERVICERS = [
    "cluster.runtime.proxy.add_inference_service",
    "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server",
]
INGRESS_CPUS = 0.1  # Ray's bookkeeping only; an ingress waits most of the time
HEALTH_TIMEOUT_S = 10.0  # a replica that answers nothing for so long is replaced; it does nothing that takes seconds
STATUS_TIMEOUT_S = 5.0
NO_ACCESS_LOG = {"enable_access_log": False}  # the service has a line of its own for each request
STOP_TIMEOUT_S = 30.0

OnStatus = Callable[[ClusterStatus], None]


def check_config(config: ClusterConfig, *, tokenizer: bool = True) -> None:
    """Finds before anything starts what would fail on every node. Reads no tensor. Raises SetupError."""
    check_checkpoint(config.model, config.engine(), config.expert_shards, tokenizer=tokenizer)


def resolve_gpus(config: ClusterConfig) -> ClusterConfig:
    """Fills in GPUs a process: one each where the Ray cluster has any."""
    default = 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
    given = (config.gpus_per_attention_replica, config.gpus_per_expert_shard)
    attention, expert = (default if gpus is None else gpus for gpus in given)
    return replace(config, gpus_per_attention_replica=attention, gpus_per_expert_shard=expert)


def check_gpus(config: ClusterConfig, *, attention_replicas: int) -> None:
    """Raises SetupError when a cluster that does not grow has fewer GPUs than the (resolved) configuration asks for."""
    attention, expert = config.gpus_per_attention_replica or 0, config.gpus_per_expert_shard or 0
    if config.device == "cuda" and not ray.cluster_resources().get("GPU", 0):
        raise SetupError("device is 'cuda', and the Ray cluster has no GPU: use device 'cpu' or 'auto'")
    asked = attention_replicas * attention + config.expert_shards * expert
    there = ray.cluster_resources().get("GPU", 0)
    if asked > there:
        raise SetupError(
            f"{asked:g} GPUs are asked for ({attention_replicas} attention replicas with {attention:g} each, "
            f"{config.expert_shards} expert shards with {expert:g} each), the Ray cluster has {there:g}: ask for fewer "
            "processes, or for fractions of a GPU a process"
        )


class RayExperts:
    """Expert shards on Ray actors for one engine in this process; `dispatcher` reaches them. Close it."""

    def __init__(self, config: ClusterConfig, metrics: DispatchMetrics, on_status: OnStatus | None = None) -> None:
        """Blocks until the shards are loaded. Raises SetupError."""
        check_config(config, tokenizer=False)
        self._ray = start_ray(num_cpus=config.expert_shards * config.cpus_per_expert_shard)
        self._controller: Any = None
        self._transport: ExpertTransport | None = None
        try:
            config = resolve_gpus(config)
            check_gpus(config, attention_replicas=0)
            self._group = f"llm-{uuid.uuid4().hex[:8]}"  # of this object alone
            self._controller = get_controller(self._group, config, collect_metrics=False)
            self._directory = ShardDirectory(self._controller, "llm", process_info(), None)
            with _StatusReports(self._group, on_status):
                self._directory.wait_ready()
        except BaseException:
            self.close()
            raise
        self._transport = make_transport(config, self._directory, metrics)
        self.dispatcher = ExpertDispatcher(
            self._transport,
            self._directory,
            metrics,
            shard_timeout_s=config.shard_timeout_s,
            recovery_timeout_s=config.recovery_timeout_s,
        )

    def close(self) -> None:
        """Takes the shards down, and Ray if this object started it. Safe to call again."""
        if self._transport is not None:
            self._transport.close()
        if self._controller is not None and ray.is_initialized():
            self._directory.close()
            _close_controller(self._controller, self._group)
        self._controller = None
        self._ray.stop()


def build_application(config: ClusterConfig) -> serve.Application:
    """The Serve application of a configuration; needs a connected Ray."""
    config = resolve_gpus(config)
    bundle = {"CPU": config.cpus_per_attention_replica}
    if config.gpus_per_attention_replica:
        bundle["GPU"] = config.gpus_per_attention_replica
    bundle |= share_of(config.attention_resource)
    environment = actor_environment(shard_group(config), 1, config.log_format)
    replicas = serve.deployment(AttentionReplica).options(
        name="AttentionReplica",
        num_replicas=config.attention_replicas if config.max_attention_replicas is None else "auto",
        autoscaling_config=None
        if config.max_attention_replicas is None
        else autoscaling_config(config.attention_replicas, config.max_attention_replicas),
        placement_group_bundles=[bundle],
        placement_group_strategy="STRICT_PACK",
        ray_actor_options={"num_cpus": 0, "runtime_env": environment},
        # The engine refuses what is too much and says why; Serve's own queue must not hide requests from it.
        max_ongoing_requests=config.max_num_seqs + config.max_waiting + 64,
        max_queued_requests=config.max_ongoing_requests,
        health_check_period_s=2.0,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.5,
        logging_config=NO_ACCESS_LOG,
    )
    ingress = serve.deployment(Ingress).options(
        name="Ingress",
        num_replicas=config.ingress_replicas,
        ray_actor_options={
            "num_cpus": INGRESS_CPUS,
            "resources": share_of(config.ingress_resource),
            "runtime_env": environment,
        },
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_ongoing_requests,
        health_check_period_s=2.0,
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.5,
        logging_config=NO_ACCESS_LOG,
    )
    application: serve.Application = ingress.bind(config, replicas.bind(config))
    return application


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Ports of a cluster on this machine; 0 takes a free one. haproxy: in front, else Serve's own proxy.
    front: where and how clients reach HAProxy; a running Ray's environment says it for its Serve."""

    grpc_port: int = 9000
    http_port: int = 0
    ray_address: str | None = None
    haproxy: bool = True
    front: GrpcFront = field(default_factory=GrpcFront)

    def serve_environment(self, directory: Path, config: ClusterConfig) -> dict[str, str]:
        """What Serve finds in its environment; files go below `directory`. Raises SetupError."""
        return {
            **DIRECT_ENVIRONMENT,
            **(local_environment(directory) if self.haproxy else {}),
            "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(max(MAX_MESSAGE_BYTES, config.max_request_bytes)),
            **self.front_environment(),
        }

    def front_environment(self) -> dict[str, str]:
        """Raises SetupError for what cannot serve, or would not be looked at."""
        said = self.front.environment()
        if said and not self.haproxy:
            raise SetupError("Serve's own proxy knows no TLS and no --host: leave them out, or use --proxy haproxy")
        if said and self.ray_address:
            settings = ", ".join(f"{name}={value}" for name, value in said.items())
            raise SetupError(
                f"the Ray at {self.ray_address} runs already, and its environment says how it is reached: leave --host "
                f"and --tls-* out, and start its nodes with {settings}"
            )
        return said


class ServedCluster:
    """The whole application, served from this machine; made by the command line and by tests. Close it."""

    def __init__(
        self, config: ClusterConfig, options: ServeOptions | None = None, on_status: OnStatus | None = None
    ) -> None:
        """Blocks until requests are answered. Raises SetupError."""
        options = options or ServeOptions()
        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # what a user must know, the caller shows
        check_config(config)
        Tokenizer(config.model)  # the ingress needs it; a missing one is named here, not by a deployment that fails
        if config.api_keys_file:
            ApiKeys(Path(config.api_keys_file), time.monotonic)  # as well
        options.front_environment()
        self.group = ""
        self.grpc_port = _free_port("grpc port", options.grpc_port)
        self.grpc_address = options.front.address(self.grpc_port)
        self.http_port = _free_port("http port", options.http_port)
        if config.metrics_port:
            _free_port("metrics port", config.metrics_port)
        num_cpus = (
            config.attention_replicas * config.cpus_per_attention_replica
            + config.expert_shards * config.cpus_per_expert_shard
            + config.ingress_replicas * INGRESS_CPUS
        )
        self._ray = start_ray(
            num_cpus=num_cpus,
            address=options.ray_address,
            environment=lambda directory: options.serve_environment(directory, config),
        )
        self._forget_address = leave_address(ray.get_runtime_context().gcs_address, self._ray.environment)
        try:
            self.config = resolve_gpus(config)
            check_gpus(self.config, attention_replicas=config.attention_replicas)
            self.group = shard_group(self.config)
            with _StatusReports(self.group, on_status):
                self._serve()
        except RuntimeError as error:
            reason = why_not_started(error, APPLICATION, self.status)
            self.close(drain=False)
            raise SetupError(f"Ray Serve did not start the application: {reason}") from error
        except BaseException:
            self.close(drain=False)
            raise

    def status(self) -> ClusterStatus:
        """The controller's view of shards and replicas."""
        status: ClusterStatus = ray.get(self._find_controller().status.remote(), timeout=STATUS_TIMEOUT_S)
        return status

    def drain(self) -> None:
        """Takes no new requests and blocks until those under way have ended, drain_timeout_s at most."""
        ray.get(self._find_controller().drain.remote(), timeout=STATUS_TIMEOUT_S)
        ingress = serve.get_app_handle(APPLICATION)
        deadline = time.monotonic() + self.config.drain_timeout_s
        time.sleep(1.0)  # the ingress asks for the controller's status twice a second
        while time.monotonic() < deadline and ingress.num_running.remote().result(timeout_s=STATUS_TIMEOUT_S):
            time.sleep(0.1)

    def close(self, *, drain: bool = True) -> None:
        """Stops what was started, in order: requests, application, shards, Ray. Safe to call again."""
        controller = _find(f"{self.group}:controller") if self.group and ray.is_initialized() else None
        if controller is not None and drain:
            self.drain()
        self._forget_address()
        # Ray prints that calls to the stopped Serve controller will be retried: nothing to act on.
        with contextlib.redirect_stdout(io.StringIO()) as noise, contextlib.redirect_stderr(noise):
            if ray.is_initialized():
                serve.shutdown()
            if controller is not None:
                _close_controller(controller, self.group)
            self._ray.stop()
        log.debug("while stopping: %s", noise.getvalue())

    def _serve(self) -> None:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": "127.0.0.1", "port": self.http_port},
            grpc_options=gRPCOptions(
                port=self.grpc_port, grpc_servicer_functions=GRPC_SERVICERS, enable_reflection=True
            ),
        )
        serve.run(
            build_application(self.config),
            name=APPLICATION,
            route_prefix="/",
            external_scaler_enabled=self.config.max_attention_replicas is None,  # else Serve scales by itself
        )

    def _find_controller(self) -> Any:
        controller = _find(f"{self.group}:controller")
        if controller is None:
            raise SetupError(f"{self.group}: there is no expert controller")
        return controller


class _StatusReports:
    """While it is open, a thread hands the controller's status to a callback twice a second."""

    def __init__(self, group: str, on_status: OnStatus | None) -> None:
        self._name = f"{group}:controller"
        self._on_status = on_status
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="status", daemon=True)

    def __enter__(self) -> None:
        if self._on_status is not None:
            self._thread.start()

    def __exit__(self, *exc_info: object) -> None:
        self._done.set()
        if self._on_status is not None:
            self._thread.join()

    def _run(self) -> None:
        assert self._on_status is not None
        while not self._done.wait(0.5):
            controller = _find(self._name)
            if controller is None:
                continue
            try:
                self._on_status(ray.get(controller.status.remote(), timeout=STATUS_TIMEOUT_S))
            except ray.exceptions.RayError as error:
                log.debug("no status: %s", error)


def _close_controller(controller: Any, group: str) -> None:
    """Takes a group's shards, its controller and what they left on this machine away."""
    try:
        ray.get(controller.close.remote(), timeout=STOP_TIMEOUT_S)
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
        log.warning("%s: the controller did not close: %s", group, error)
    ray.kill(controller)
    shutil.rmtree(metrics_dir(group), ignore_errors=True)


def _find(name: str) -> Any | None:
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None


def _free_port(what: str, port: int) -> int:
    """The port if it can be bound, a free one for 0. Raises SetupError for one that is taken, or none."""
    if not port:
        return free_block(1).start
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OverflowError:
            raise SetupError(f"{what} is {port}, a port is 0 to 65535") from None
        except OSError as error:
            raise SetupError(
                f"{what} {port} is taken ({error.strerror}): choose another, or 0 for a free one"
            ) from error
    return port
