"""Checks a configuration before anything starts, and builds its Serve application."""

import shutil
from dataclasses import replace

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig

from cluster.checkpoint.info import max_model_len, resolve_dtype
from cluster.checkpoint.model_files import pinned
from cluster.checkpoint.opening import open_checkpoint
from cluster.config import ClusterConfig
from cluster.config.resources import available_cpus, memory_limit
from cluster.config.speculation import with_model
from cluster.config.tensor_parallel import share_of as share_of_rank
from cluster.engine.preflight import check_checkpoint
from cluster.errors import SetupError
from cluster.experts.placement import num_shards_for
from cluster.model.cache_size import check_cache_room
from cluster.runtime.control.adapters import check_free
from cluster.runtime.front.attention_replica import AttentionReplica
from cluster.runtime.front.autoscaling import autoscaling_config
from cluster.runtime.front.ingress import Ingress
from cluster.runtime.front.shared_prompt_router import SharedPromptRouter
from cluster.runtime.names import ATTENTION_REPLICA, INGRESS, shard_group
from cluster.runtime.process import actor_environment, share_of
from cluster.tracing.settings import check_installed

GRPC_SERVICERS = [
    "cluster.runtime.proxy.add_inference_service",
    "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server",
]
PROCESS_BYTES = 100_000_000  # all of a server of the demo take 2 GB, shared pages counted once: 115 MB each of 17
CALLS_BEING_REFUSED = 1024  # at a time, in an ingress
INGRESS_CPUS = 0.1  # Ray's bookkeeping only; an ingress waits most of the time
HEALTH_TIMEOUT_S = 10.0  # Serve replaces a replica that is silent for so long; none of its work takes seconds
NO_ACCESS_LOG = {"enable_access_log": False}  # the service has one of its own, `log_requests`


def check_config(config: ClusterConfig, *, tokenizer: bool = True) -> ClusterConfig:
    """Finds, before anything starts, faults that every node would meet. Reads no tensor. Raises SetupError.

    Returns the configuration with a model that means the same files for ever, and with at most as many shards as it
    can have: none for a dense one.
    """
    check_installed(config)
    check_free(config, config.lora_adapters or {})
    drafts = with_model(config.speculative_config, pinned)
    config = replace(config, model=pinned(config.model), speculative_config=drafts)
    texts = tokenizer and not config.skip_tokenizer
    reader = check_checkpoint(config.model, config.engine(), config.expert_shards, tokenizer=texts)
    return replace(config, expert_shards=num_shards_for(reader.config.num_experts, config.expert_shards))


def check_cpus(config: ClusterConfig, *, attention_replicas: int = 0) -> None:
    """Checks CPUs for a Ray of this machine, which does not count the real ones. Raises SetupError."""
    available, ranks = available_cpus(), config.tensor_parallel_size
    for name, processes, at_once in (
        ("cpus_per_expert_shard", config.expert_shards, 1),
        ("cpus_per_attention_replica", attention_replicas, ranks),
    ):
        cpus = getattr(config, name)
        if processes and cpus * at_once > available:
            each = f", for each of {at_once} ranks" if at_once > 1 else ""
            raise SetupError(f"{name} is {cpus:g}{each}, and this machine has {available} CPUs: ask for fewer")


def check_memory(config: ClusterConfig, *, attention_replicas: int = 0, ingresses: int = 0) -> None:
    """Checks processes and their caches for a Ray of this machine. Raises SetupError for what cannot have room.

    The model's weights are not counted: their files may be in memory once for all.
    """
    machine = memory_limit()
    if machine is None:
        return
    ranks = config.tensor_parallel_size
    processes = config.expert_shards + attention_replicas * ranks + ingresses
    if processes * PROCESS_BYTES > machine:
        each = f" of {ranks} ranks" if ranks > 1 else ""
        raise SetupError(
            f"{processes} processes are asked for ({attention_replicas} attention replicas{each}, "
            f"{config.expert_shards} expert shards, {ingresses} ingresses), of {PROCESS_BYTES / 1e6:.0f} MB each at "
            f"least, and this machine has {machine / 1e9:.3g} GB: ask for fewer"
        )
    # torch, which would tell exactly, is loaded where it computes alone: engines look again.
    on_cpus = config.device == "cpu" or (config.device == "auto" and shutil.which("nvidia-smi") is None)
    engine, model = config.engine(), open_checkpoint(config.model, config.rope_scaling).config
    check_cache_room(
        share_of_rank(model, 0, ranks).config, engine, resolve_dtype(config.dtype, model),
        max_model_len=max_model_len(model, engine), num=attention_replicas * ranks,
        machine_bytes=machine if on_cpus else None,
    )  # fmt: skip


def resolve_gpus(config: ClusterConfig) -> ClusterConfig:
    """Fills in the GPUs of a process where they are None: one where the Ray cluster has any, else none."""
    default = 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
    given = (config.gpus_per_attention_replica, config.gpus_per_expert_shard)
    attention, expert = (default if gpus is None else gpus for gpus in given)
    return replace(config, gpus_per_attention_replica=attention, gpus_per_expert_shard=expert)


def check_gpus(config: ClusterConfig, *, attention_replicas: int) -> None:
    """Raises SetupError when a cluster that does not grow has fewer GPUs than the (resolved) configuration asks for."""
    attention, expert = config.gpus_per_attention_replica or 0, config.gpus_per_expert_shard or 0
    if config.device == "cuda" and not ray.cluster_resources().get("GPU", 0):
        raise SetupError("device is 'cuda', and the Ray cluster has no GPU: use device 'cpu' or 'auto'")
    processes = attention_replicas * config.tensor_parallel_size
    asked = processes * attention + config.expert_shards * expert
    available = ray.cluster_resources().get("GPU", 0)
    if asked > available:
        raise SetupError(
            f"{asked:g} GPUs are asked for ({processes} processes of attention replicas with {attention:g} each, "
            f"{config.expert_shards} expert shards with {expert:g} each), the Ray cluster has {available:g}: ask for "
            "fewer processes, or for fractions of a GPU a process"
        )


def build_application(config: ClusterConfig) -> serve.Application:
    """The Serve application of a configuration; needs a connected Ray."""
    config = resolve_gpus(config)
    environment = actor_environment(shard_group(config), 1, config.log_format)
    # Serve's `options` has no such option.
    with_steps = serve.deployment(rolling_update_percentage=config.rolling_update_percentage)
    replicas = with_steps(AttentionReplica).options(
        name=ATTENTION_REPLICA,
        num_replicas=config.attention_replicas if config.max_attention_replicas is None else "auto",
        autoscaling_config=None
        if config.max_attention_replicas is None
        else autoscaling_config(config.attention_replicas, config.max_attention_replicas),
        placement_group_bundles=[_bundle(config)] * config.tensor_parallel_size,
        placement_group_strategy="STRICT_PACK",
        ray_actor_options={"num_cpus": 0, "runtime_env": environment},
        # The engine refuses requests beyond its limits and says why; Serve's queue must not hide requests from it.
        max_ongoing_requests=config.max_num_seqs + config.max_waiting + 64,
        max_queued_requests=config.max_ongoing_requests,
        request_router_config=RequestRouterConfig(
            request_router_class=SharedPromptRouter, request_router_kwargs={"max_num_seqs": config.max_num_seqs}
        ),
        max_surge_percent=config.max_surge_percent,
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
        max_surge_percent=100,  # HAProxy knows a new ingress before an old one, perhaps the only one, goes
        # The ingress itself counts and refuses calls, those without a key apart from the others. In Serve's own queue,
        # which checks no key, health would wait behind calls that stay.
        max_ongoing_requests=_calls_of_an_ingress(config),
        max_queued_requests=config.max_ongoing_requests,
        health_check_period_s=2.0,
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.5,
        logging_config=NO_ACCESS_LOG,
    )
    application: serve.Application = ingress.bind(config, replicas.bind(config))
    return application


def _bundle(config: ClusterConfig) -> dict[str, float]:
    """Of the placement group of an attention replica, for each rank."""
    gpus = {"GPU": config.gpus_per_attention_replica} if config.gpus_per_attention_replica else {}
    return {"CPU": config.cpus_per_attention_replica, **gpus, **share_of(config.attention_resource)}


def _calls_of_an_ingress(config: ClusterConfig) -> int:
    """As many as Serve lets in at a time: more than admission does, which says why it refuses one."""
    return config.max_ongoing_requests + config.max_keyless_calls + config.max_watchers + CALLS_BEING_REFUSED
