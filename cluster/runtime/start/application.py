"""The Serve application of a configuration, and what is checked of one before anything starts."""

from dataclasses import replace

import ray
from ray import serve

from cluster.config import ClusterConfig
from cluster.config.resources import available_cpus
from cluster.engine.preflight import check_checkpoint
from cluster.errors import SetupError
from cluster.experts.placement import num_shards_for
from cluster.runtime.front.attention_replica import AttentionReplica
from cluster.runtime.front.autoscaling import autoscaling_config
from cluster.runtime.front.ingress import Ingress
from cluster.runtime.names import ATTENTION_REPLICA, INGRESS, shard_group
from cluster.runtime.process import actor_environment, share_of

GRPC_SERVICERS = [
    "cluster.runtime.proxy.add_inference_service",
    "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server",
]
CALLS_BEING_REFUSED = 1024  # in an ingress at a moment
INGRESS_CPUS = 0.1  # Ray's bookkeeping only; an ingress waits most of the time
HEALTH_TIMEOUT_S = 10.0  # a replica that answers nothing for so long is replaced; it does nothing that takes seconds
NO_ACCESS_LOG = {"enable_access_log": False}  # the service has one of its own, `log_requests`


def check_config(config: ClusterConfig, *, tokenizer: bool = True) -> ClusterConfig:
    """Finds before anything starts what would fail on every node. Reads no tensor. Raises SetupError.

    Returns the configuration with as many shards as the model can have: none for a dense one.
    """
    reader = check_checkpoint(config.model, config.engine(), config.expert_shards, tokenizer=tokenizer)
    return replace(config, expert_shards=num_shards_for(reader.config.num_experts, config.expert_shards))


def check_cpus(config: ClusterConfig, *, attention_replicas: int = 0) -> None:
    """For a Ray of this machine, to which its CPUs are only numbers. Raises SetupError."""
    there = available_cpus()
    for name, processes in (
        ("cpus_per_expert_shard", config.expert_shards),
        ("cpus_per_attention_replica", attention_replicas),
    ):
        if processes and getattr(config, name) > there:
            raise SetupError(f"{name} is {getattr(config, name):g}, and this machine has {there} CPUs: ask for fewer")


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


def build_application(config: ClusterConfig) -> serve.Application:
    """The Serve application of a configuration; needs a connected Ray."""
    config = resolve_gpus(config)
    bundle = {"CPU": config.cpus_per_attention_replica}
    if config.gpus_per_attention_replica:
        bundle["GPU"] = config.gpus_per_attention_replica
    bundle |= share_of(config.attention_resource)
    environment = actor_environment(shard_group(config), 1, config.log_format)
    replicas = serve.deployment(AttentionReplica).options(
        name=ATTENTION_REPLICA,
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
        name=INGRESS,
        num_replicas=config.ingress_replicas,
        ray_actor_options={
            "num_cpus": INGRESS_CPUS,
            "resources": share_of(config.ingress_resource),
            "runtime_env": environment,
        },
        max_surge_percent=100,  # a new one is known to HAProxy before an old one goes, of which there may be one only
        # The ingress itself counts and refuses, calls without a key apart from others. In Serve's own queue, which asks
        # for no key, health would wait behind whatever stays.
        max_ongoing_requests=config.max_ongoing_requests + config.max_keyless_calls + CALLS_BEING_REFUSED,
        max_queued_requests=config.max_ongoing_requests,
        health_check_period_s=2.0,
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.5,
        logging_config=NO_ACCESS_LOG,
    )
    application: serve.Application = ingress.bind(config, replicas.bind(config))
    return application
