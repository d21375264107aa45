"""Starts and stops the whole served application, on a Ray of this machine or on one that runs already."""

import contextlib
import io
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import gRPCOptions

from cluster.checkpoint.model_files import model_directory
from cluster.checkpoint.opening import open_checkpoint
from cluster.config import ClusterConfig
from cluster.config.environment import DIRECT_ENVIRONMENT
from cluster.errors import ClusterError, SetupError
from cluster.footprint.folders import OwnedFolder
from cluster.footprint.servers import Server, announce
from cluster.runtime.front.haproxy import MAX_MESSAGE_BYTES, SERVERS_ENVIRONMENT, free_block, local_environment
from cluster.runtime.front.tls import GrpcFront
from cluster.runtime.names import APPLICATION, controller_name, shard_group
from cluster.runtime.start.application import (
    GRPC_SERVICERS,
    INGRESS_CPUS,
    build_application,
    check_config,
    check_cpus,
    check_gpus,
    check_memory,
    resolve_gpus,
)
from cluster.runtime.start.failure import why_not_started
from cluster.runtime.start.groups import STATUS_TIMEOUT_S, OnStatus, StatusReports, close_controller, find_actor
from cluster.runtime.start.local_ray import start_ray
from cluster.serving.admission.api_keys import ApiKeys
from cluster.serving.text.tokenizer import Tokenizer
from cluster.status import ClusterStatus

log = logging.getLogger(__name__)

DRAIN_INTERVAL_S = 0.1  # between two questions for the requests under way


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Ports of a cluster on this machine; 0 takes a free one. haproxy: use HAProxy, else Serve's own proxy.
    front: where and how clients reach HAProxy; for a Ray that runs already, its environment sets it."""

    grpc_port: int = 9000
    http_port: int = 0
    ray_address: str | None = None
    haproxy: bool = True
    front: GrpcFront = field(default_factory=GrpcFront)

    def serve_environment(self, directory: Path, config: ClusterConfig) -> dict[str, str]:
        """The environment for Serve; its files go below `directory`. Raises SetupError."""
        return {
            **DIRECT_ENVIRONMENT,
            **(local_environment(directory) if self.haproxy else SERVERS_ENVIRONMENT),
            "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(max(MAX_MESSAGE_BYTES, config.max_request_bytes)),
            **self.front_environment(),
        }

    def front_environment(self) -> dict[str, str]:
        """The environment of the front. Raises SetupError for values that cannot serve, or that nothing would read."""
        variables = self.front.environment()
        if variables and not self.haproxy:
            raise SetupError("Serve's own proxy knows no TLS and no --host: leave them out, or use --proxy haproxy")
        if variables and self.ray_address:
            settings = ", ".join(f"{name}={value}" for name, value in variables.items())
            raise SetupError(
                f"the Ray at {self.ray_address} runs already, and its environment says how it is reached: leave --host "
                f"and --tls-* out, and start its nodes with {settings}"
            )
        return variables


class ServedCluster:
    """The whole application, served from this machine; made by the command line and by tests. Close it."""

    def __init__(
        self,
        config: ClusterConfig,
        options: ServeOptions | None = None,
        on_status: OnStatus | None = None,
        on_lost: Callable[[str], None] = lambda reason: log.error("the server has ended: %s", reason),
        on_checked: Callable[[], None] = lambda: None,
    ) -> None:
        """Blocks until requests are answered. Raises SetupError.

        on_lost: as in `start_ray`.  on_checked: called after all checks that need no start.
        """
        options = options or ServeOptions()
        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # the caller shows what a user must know
        config = check_config(_with_ports_apart(options, config))
        if options.ray_address is None and not ray.is_initialized():
            check_cpus(config, attention_replicas=config.attention_replicas)
            check_memory(config, attention_replicas=config.attention_replicas, ingresses=config.ingress_replicas)
            open_checkpoint(config.model, config.rope_scaling).check_room()
        _check_ingress_files(config)
        options.front_environment()
        self.group, self._model = "", config.model
        self.grpc_port = _free_port("grpc port", options.grpc_port)
        self.grpc_address = options.front.address(self.grpc_port)
        self.http_port = _free_port("http port", options.http_port)
        self.http_url = options.front.url(self.http_port) if config.http_api else ""
        if config.metrics_port:
            _free_port("metrics port", config.metrics_port)
        on_checked()
        self._ray = start_ray(
            num_cpus=_num_cpus(config),
            address=options.ray_address,
            environment=lambda directory: options.serve_environment(directory, config),
            on_lost=on_lost,
        )
        self._folder: OwnedFolder | None = None
        try:
            self._announce()
            self.config = resolve_gpus(config)
            check_gpus(self.config, attention_replicas=config.attention_replicas)
            self.group = shard_group(self.config)
            with StatusReports(self.group, on_status):
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
        """Refuses new requests and blocks until those under way have ended, for drain_timeout_s at most."""
        ray.get(self._find_controller().drain.remote(), timeout=STATUS_TIMEOUT_S)
        ingresses = serve.get_app_handle(APPLICATION)
        deadline = time.monotonic() + self.config.drain_timeout_s
        while any(ingresses.broadcast("drain").results(timeout_s=STATUS_TIMEOUT_S)) and time.monotonic() < deadline:
            time.sleep(DRAIN_INTERVAL_S)

    def close(self, *, drain: bool = True) -> None:
        """Stops requests, application, shards, Ray, in this order. Safe to call again.

        A step that fails does not prevent the later ones.
        """
        try:
            if ray.is_initialized():
                self._stop_application(drain)
        finally:
            if self._folder is not None:
                self._folder.remove()
            self._ray.stop()

    def _stop_application(self, drain: bool) -> None:
        controller = find_actor(controller_name(self.group)) if self.group else None
        # Ray prints that it will retry calls to the stopped Serve controller: users need not act.
        with contextlib.redirect_stdout(io.StringIO()) as noise, contextlib.redirect_stderr(noise):
            if controller is not None and drain:
                _attempt("drain", self.drain)
            _attempt("stop Serve", serve.shutdown)
            if controller is not None:
                _attempt("stop the shards", lambda: close_controller(controller, self.group))
        log.debug("while stopping: %s", noise.getvalue())

    def _announce(self) -> None:
        self._folder = OwnedFolder()
        server = Server(
            ray_address=ray.get_runtime_context().gcs_address,
            grpc_address=self.grpc_address,
            model=self._model,
            environment=self._ray.environment,
        )
        announce(server, self._folder.path)

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
        controller = find_actor(controller_name(self.group))
        if controller is None:
            raise SetupError(f"{self.group}: there is no expert controller")
        return controller


def _attempt(what: str, step: Callable[[], None]) -> None:
    try:
        step()
    except (ClusterError, OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        log.warning("while stopping, could not %s: %s", what, error)


def _with_ports_apart(options: ServeOptions, config: ClusterConfig) -> ClusterConfig:
    """Returns the configuration. Raises SetupError for one port with two purposes; 0 takes another one each time."""
    ports = {"grpc port": options.grpc_port, "http port": options.http_port, "metrics port": config.metrics_port}
    given: dict[int, str] = {}
    for what, port in ports.items():
        if port and port in given:
            raise SetupError(f"{given[port]} and {what} are both {port}: choose two, or 0 for a free one")
        given[port] = what
    return config


def _free_port(what: str, port: int) -> int:
    """The port if it is free, or a free one for 0. Raises SetupError for a port that is taken or out of range."""
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


def _check_ingress_files(config: ClusterConfig) -> None:
    """Raises SetupError for files that an ingress could not use, before a deployment fails by them."""
    if not config.skip_tokenizer:
        Tokenizer(model_directory(config.model))
    for keys in filter(None, (config.api_keys_file, config.admin_keys_file)):
        ApiKeys(Path(keys), time.monotonic)


def _num_cpus(config: ClusterConfig) -> float:
    """The CPUs that a served application asks of Ray."""
    return (
        config.attention_replicas * config.tensor_parallel_size * config.cpus_per_attention_replica
        + config.expert_shards * config.cpus_per_expert_shard
        + config.ingress_replicas * INGRESS_CPUS
    )
