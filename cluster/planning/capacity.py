"""The hardware that a model needs for a load: GPUs by their published figures, or machines as they were measured."""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from cluster.checkpoint.info import max_model_len
from cluster.checkpoint.sizes import ModelSizes
from cluster.config import EngineConfig, ModelConfig
from cluster.errors import SetupError
from cluster.planning.calibration import Calibration
from cluster.planning.changes import Events, let_fail, let_scale
from cluster.planning.costs import FrontCosts, StepCosts
from cluster.planning.engine import Limits
from cluster.planning.hardware import GPUS, Gpu
from cluster.planning.load import TraceLoad
from cluster.planning.roofline import Roofline
from cluster.planning.search import Goal, Search, Trial, num_machines
from cluster.planning.sharing import SharedCores
from cluster.planning.simulation import ClusterModel, Record, Simulation

WEIGHTS_SHARE = 0.9  # of a shard's memory, at most
# As of `memory_utilization`: of the memory that the weights leave.
CACHE_SHARE_GPU, CACHE_SHARE_CPU = 0.9, 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Of each process. name: for messages.  memory_bytes: that it has.  cores: of a machine whose processes compute on
    a core each; None for a GPU each.  source: of the figures."""

    name: str
    memory_bytes: float
    cache_share: float
    costs: StepCosts
    cores: SharedCores | None
    latency_s: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """A cluster for a goal. num_units: GPUs, or machines."""

    hardware: Hardware
    goal: Goal
    trial: Trial
    cache_tokens: int

    @property
    def num_units(self) -> int:
        cluster = self.trial.cluster
        if self.hardware.cores is None:
            return cluster.replicas + cluster.shards
        return num_machines(self.hardware.cores.num_cores, cluster)

    @property
    def unit_seconds(self) -> float:
        """For a million output tokens."""
        return 1e6 * self.num_units / (self.goal.rate * self.goal.lengths.output_tokens)

    @property
    def busy(self) -> dict[str, float]:
        """Shares of the time in which each part works."""
        cluster, record = self.trial.cluster, self.trial.record
        shares = {"attention": record.step_s / record.end_s / cluster.replicas}
        if cluster.shards:
            shares["shards"] = record.shard_s / record.end_s
        return {name: min(1.0, share) for name, share in shares.items()}

    @property
    def step_ms(self) -> dict[str, float]:
        """The parts of a mean step that follow one another, and the wait for others."""
        record = self.trial.record
        parts = {
            "attention": record.attention_s,
            "experts": record.waited_s,
            "crossings": record.crossing_s,
        }
        parts["waiting for other replicas' steps"] = record.step_s - sum(parts.values())
        return {name: 1000 * max(0.0, seconds) / max(1, record.steps) for name, seconds in parts.items()}

    @property
    def bottleneck(self) -> str:
        """In words."""
        if self.trial.record.preempted:
            return f"KV cache: {self.trial.record.preempted} sequences were thrown out of it"
        parts = self.step_ms
        name = max(parts, key=lambda part: parts[part])
        return f"{name}: {parts[name]:.1f} of {sum(parts.values()):.1f} ms of a mean step"


def gpu_hardware(gpu: Gpu, config: ModelConfig, sizes: ModelSizes) -> Hardware:
    """latency_s: none is known of a cluster with GPUs; that of the machine in BENCHMARKS.md is small beside a step."""
    return Hardware(
        name=gpu.name,
        memory_bytes=gpu.memory_bytes,
        cache_share=CACHE_SHARE_GPU,
        costs=Roofline(config, sizes, gpu),
        cores=None,
        latency_s=0.0,
        source=f"{gpu.memory_bytes / 1e9:.0f} GB, {gpu.bytes_s / 1e12:.3g} TB/s, {gpu.flops / 1e12:.0f} TFLOP/s "
        f"({gpu.source}), and the shares of these that one H200 reached (BENCHMARKS.md)",
    )


def measured_hardware(found: Calibration) -> Hardware:
    """A process for each core, with its share of the machine's memory."""
    front: FrontCosts = found.front
    return Hardware(
        name=f"machine of {found.num_cores} cores",
        memory_bytes=found.memory_bytes / found.num_cores,
        cache_share=CACHE_SHARE_CPU,
        costs=found,
        cores=SharedCores(num_cores=found.num_cores, front=front, stretch=found.stretch),
        latency_s=front.latency_s,
        source=f"measured; crossings between machines were not. {found.machine}",
    )


def plan_capacity(
    hardware: Hardware, config: ModelConfig, sizes: ModelSizes, engine: EngineConfig, goal: Goal
) -> Capacity:
    """The cluster with the fewest processes. Raises SetupError where there is none, with the nearest possible."""
    cluster = base_cluster(hardware, config, sizes, engine)
    tokens = goal.lengths.prompt_tokens + goal.lengths.output_tokens
    _check_length("--input and --output make", tokens, hardware, cluster, max_model_len(config, engine))
    search = Search(costs=hardware.costs, cluster=cluster, most_shards=config.num_experts)
    trial = search.find(goal)
    return Capacity(hardware=hardware, goal=goal, trial=trial, cache_tokens=cluster.limits.cache_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A trace on a cluster. unit_seconds: of all GPUs, or machines."""

    hardware: Hardware
    cluster: ClusterModel
    record: Record
    num_requests: int
    unit_seconds: float


def replay(
    hardware: Hardware, cluster: ClusterModel, load: TraceLoad, *,
    events: Events, context_tokens: int, report: Callable[[int], None],
) -> Replay:  # fmt: skip
    """Answers a trace. report: called with the requests that have ended. Raises SetupError for one without room."""
    longest = max(prompt + output for _, prompt, output in load.arrivals)
    _check_length("--trace has a request of", longest, hardware, cluster, context_tokens)
    simulation = Simulation(cluster, hardware.costs, load, on_ended=report)
    if events.failures is not None:
        most = cluster.replicas if events.scaling is None else events.scaling.most
        let_fail(simulation, events.failures, most_replicas=most)
    if events.scaling is not None:
        let_scale(simulation, events.scaling)
    record = simulation.run()
    units = record.replica_s + cluster.shards * simulation.now
    return Replay(
        hardware=hardware,
        cluster=cluster,
        record=record,
        num_requests=load.num_requests,
        unit_seconds=units if cluster.cores is None else units / hardware_cores(hardware),
    )


def _check_length(what: str, tokens: int, hardware: Hardware, cluster: ClusterModel, context_tokens: int) -> None:
    """Raises SetupError for a request that the model or its cache has no room for."""
    if tokens > context_tokens:
        raise SetupError(
            f"{what} {tokens:,} tokens, the model's context has {context_tokens:,} (--max-model-len, --rope-scaling)"
        )
    if tokens > cluster.limits.cache_tokens:
        raise SetupError(
            f"{what} {tokens:,} tokens, the cache of an attention replica on {hardware.name} has room for "
            f"{cluster.limits.cache_tokens:,}"
        )


def hardware_cores(hardware: Hardware) -> float:
    """Processes of a machine."""
    assert hardware.cores is not None
    return hardware.cores.num_cores


def base_cluster(hardware: Hardware, config: ModelConfig, sizes: ModelSizes, engine: EngineConfig) -> ClusterModel:
    """With one replica and as few shards as have room for the experts. Raises SetupError for a model without room."""
    room = hardware.memory_bytes - sizes.dense_bytes
    cache_bytes = engine.kv_cache_bytes or int(max(0.0, room) * hardware.cache_share)
    cache_tokens = cache_bytes // sizes.kv_bytes_per_token
    if room <= cache_bytes or cache_tokens < engine.block_size:
        raise SetupError(
            f"{hardware.name} has {hardware.memory_bytes / 1e9:.3g} GB for a process, and an attention replica has "
            f"{sizes.dense_bytes / 1e9:.3g} GB of weights and needs room for a cache: "
            + (_nearest_gpu(sizes) if hardware.cores is None else "machines with more memory for each core are needed")
        )
    experts_bytes = len(config.sparse_layers) * config.num_experts * sizes.expert_bytes
    shards = ceil(experts_bytes / (WEIGHTS_SHARE * hardware.memory_bytes))
    if shards > config.num_experts:
        raise SetupError(
            f"the experts' {experts_bytes / 1e9:.3g} GB need {shards} of {hardware.name}, and a model with "
            f"{config.num_experts} experts has so many shards at most"
        )
    return ClusterModel(
        replicas=1,
        shards=shards,
        limits=Limits(
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            max_waiting=engine.max_waiting,
            cache_tokens=cache_tokens,
            block_size=engine.block_size,
        ),
        latency_s=hardware.latency_s,
        cores=hardware.cores,
    )


def _nearest_gpu(sizes: ModelSizes) -> str:
    fitting = [gpu for gpu in GPUS.values() if gpu.memory_bytes * WEIGHTS_SHARE > sizes.dense_bytes]
    if not fitting:
        return "no GPU of the table has room"
    return f"{min(fitting, key=lambda gpu: gpu.memory_bytes).name} is the smallest that has"
