"""Puts an engine together from a checkpoint; with `local_experts`, the whole model in one process."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from cluster.checkpoint.generation import read_eos_token_ids
from cluster.checkpoint.info import max_model_len, resolve_dtype
from cluster.checkpoint.names import checkpoint_shapes, dense_shapes
from cluster.checkpoint.opening import Checkpoint, open_checkpoint
from cluster.checkpoint.special_tokens import read_tokenizer_config
from cluster.checkpoint.tokenizer_files import read_tokenizer
from cluster.config import EngineConfig, ModelConfig
from cluster.config.kv_cache import AUTO, check_cache_device
from cluster.config.lora import AdapterList
from cluster.config.resources import available_memory, memory_limit
from cluster.config.tensor_parallel import share_of
from cluster.engine.adapter_loading import adapter_loader, begin_adapters
from cluster.engine.adapters import Adapters, AdapterSetup, ShareAdapters
from cluster.engine.block_manager import BlockManager, make_block_manager
from cluster.engine.draft_loading import load_draft, models_part, with_drafts
from cluster.engine.engine import Engine
from cluster.engine.graphs import decode_graphs
from cluster.engine.group import Group
from cluster.engine.isolation import OnStep
from cluster.engine.leader import Leader
from cluster.engine.micro_batching import MicroBatching
from cluster.engine.runner import ModelRunner
from cluster.errors import SetupError
from cluster.experts.dispatch import ExpertDispatcher
from cluster.experts.placement import num_shards_for, plan_evenly
from cluster.experts.routing import FixedPlan
from cluster.experts.shard import ExpertShard
from cluster.experts.transport import LocalTransport
from cluster.grammar.grammars import Grammars
from cluster.kernels.stored import quantization_on
from cluster.metrics import DispatchMetrics, EngineMetrics
from cluster.model.cache_size import check_cache_room, num_kv_blocks
from cluster.model.decoder import CausalLM
from cluster.model.kv_cache import KVCache, cache_for
from cluster.model.registry import load_model

log = logging.getLogger(__name__)

# Of what is free once the weights are loaded. A GPU keeps room for a step; a machine for a step, for shards that load
# what moves to them, for files and for other programs.
DEFAULT_UTILIZATION = {"cuda": 0.9, "cpu": 0.5}


class OtherRanks(Protocol):
    """The processes of the ranks from 1 on, which load their parts while rank 0 loads its own."""

    def join(self, device: torch.device) -> Group:
        """Waits until they have loaded them, then joins them. Raises SetupError, CheckpointError, Unavailable."""


def torch_dtype(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name)
    return found


def resolve_device(device: str) -> torch.device:
    """ "auto" is CUDA where this process sees one. Raises SetupError for a CUDA device that is missing."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SetupError("device is 'cuda', but torch sees no CUDA device in this process: use device 'cpu' or 'auto'")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def device_of(config: EngineConfig) -> torch.device:
    """As `resolve_device`. Raises SetupError for one that has no attention over the cache that is asked for, too."""
    device = resolve_device(config.device)
    check_cache_device(config.kv_cache_dtype, device.type)
    return device


def whole_memory(device: torch.device) -> int | None:
    """Bytes that this process may have of the CPUs' memory, free or not; None for another device's, and if unknown."""
    return memory_limit() if device.type == "cpu" else None


def load_engine(
    model_dir: str | Path,
    config: EngineConfig,
    experts: ExpertDispatcher,
    metrics: EngineMetrics,
    progress: Callable[[int], None] | None = None,
    *,
    remote_experts: bool = False,
    on_step: OnStep = lambda _: None,
    wait_for_experts: Callable[[], object] = lambda: None,
    num_sharers: int = 1,
    adapters: AdapterSetup | None = None,
    others: OtherRanks | None = None,
) -> Engine:
    """Loads the dense half of a checkpoint and makes its engine. Blocks. Raises CheckpointError, SetupError.

    model_dir: or a name on the hub.  progress: called with the bytes of each piece that is downloaded or read.
    remote_experts: they are in other processes, so that splitting a step may hide the time of the crossing.
    on_step: as of `Engine`.  adapters: the LoRA adapters to begin with.
    wait_for_experts: called when the dense weights are loaded. By default the cache is sized by the memory that is free
    then.  num_sharers: engines that share this free memory, this one included.  others: the ranks from 1 on.
    """
    reader = open_checkpoint(model_dir, config.rope_scaling)
    dtype, device = resolve_dtype(config.dtype, reader.config), device_of(config)
    longest = max_model_len(reader.config, config)
    model = load_part(reader, config, 0, progress)
    draft = load_draft(config, model, dtype, progress)
    wait_for_experts()
    leader = Leader(others.join(device), reader.config, torch_dtype(dtype)) if others else None
    loaded = _adapters(model, reader.config, config, adapters or AdapterSetup(), leader)
    share, room = memory_share(config, device, num_sharers), free_memory(device)
    limits, part = models_part(config, share, draft)
    num_blocks = num_kv_blocks(model.config, limits, dtype, max_model_len=longest, room_bytes=room, share=part)
    num_blocks = leader.least(num_blocks) if leader else num_blocks
    cache = cache_for(model.config, config, num_blocks, dtype, device)
    runner = _runner(model, cache, experts, config, remote_experts=remote_experts)
    runner.leader = model.ranks = leader
    blocks = _reported(make_block_manager(reader.config, config, num_blocks), config, cache.num_bytes, longest)
    return Engine(
        with_drafts(runner, config, draft, room_bytes=room, share=share),
        config,
        blocks=blocks,
        eos_token_ids=read_eos_token_ids(reader.model_dir, reader.config),
        max_model_len=longest,
        metrics=metrics,
        on_step=on_step,
        grammars=_grammars(reader.model_dir, reader.config),
        adapters=loaded,
    )


def load_part(
    reader: Checkpoint, config: EngineConfig, rank: int, progress: Callable[[int], None] | None = None
) -> CausalLM:
    """Loads a rank's part of the dense half: all of it where there is one rank. Raises CheckpointError, SetupError."""
    size, device, dtype = config.tensor_parallel_size, device_of(config), resolve_dtype(config.dtype, reader.config)
    share = share_of(reader.config, rank, size) if size > 1 else None
    check_cache_room(
        reader.config if share is None else share.config, config, dtype, num=size,
        max_model_len=max_model_len(reader.config, config), machine_bytes=whole_memory(device),
    )  # fmt: skip
    return load_model(
        reader, dtype=torch_dtype(dtype), device=device, progress=progress, share=share,
        quantization=quantization_on(config.quantization, device, reader.config.stored),
    )  # fmt: skip


def memory_share(config: EngineConfig, device: torch.device, num_sharers: int) -> float:
    """Of the memory that is free. Ranks on CPUs share a machine's memory; on GPUs each has its own."""
    num_ranks = config.tensor_parallel_size if device.type == "cpu" else 1
    return (config.memory_utilization or DEFAULT_UTILIZATION[device.type]) / (num_sharers * num_ranks)


def _runner(
    model: CausalLM, cache: KVCache, experts: ExpertDispatcher, config: EngineConfig, *, remote_experts: bool
) -> ModelRunner:
    """It replays decode steps as CUDA graphs, where it can."""
    splits = remote_experts and model.config.moe is not None
    runner = ModelRunner(model, cache, experts, config.block_size, MicroBatching(enabled=splits))
    if config.cuda_graphs and config.tensor_parallel_size == 1:
        inside = experts if not remote_experts and experts.plans.current().num_shards <= 1 else None
        runner.graphs = decode_graphs(model, cache, runner.attention, inside, max_sequences=config.max_num_seqs)
    return runner


def _adapters(
    model: CausalLM, whole: ModelConfig, config: EngineConfig, setup: AdapterSetup, leader: Leader | None
) -> Adapters:
    """Those to begin with, at all ranks. Raises CheckpointError, Unavailable."""
    load = adapter_loader(model, whole, config)
    if leader is None:
        return begin_adapters(load, config, setup)
    found = begin_adapters(leader.adapters.at_all_ranks(load), config, setup)
    leader.least([0])  # now the others look how much memory is free
    return found


def _grammars(model_dir: Path, model: ModelConfig) -> Grammars:
    """The tokenizer is read when a request needs it: an engine has none otherwise."""
    eos_token_ids = read_eos_token_ids(model_dir, model)
    return Grammars(
        lambda: read_tokenizer(model_dir, read_tokenizer_config(model_dir)), model.vocab_size, eos_token_ids
    )


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can still take on a device; None if unknown."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return available_memory()


def _reported(blocks: BlockManager, config: EngineConfig, num_bytes: int, longest: int) -> BlockManager:
    form = "" if config.kv_cache_dtype == AUTO else f" in {config.kv_cache_dtype}"
    cache = f"{blocks.num_blocks * config.block_size:,} tokens{form}, {num_bytes / 2**20:,.0f} MiB"
    if blocks.max_tokens < longest:
        log.warning(
            "KV cache: %s; the context has %s: without max_tokens an answer ends where the cache is full "
            "(kv_cache_bytes)",
            cache,
            f"{longest:,}",
        )
    else:
        log.info("KV cache: %s", cache)
    return blocks


def local_experts(
    model_dir: str | Path,
    config: EngineConfig,
    num_shards: int,
    metrics: DispatchMetrics,
    progress: Callable[[int], None] | None = None,
) -> ExpertDispatcher:
    """All experts in this process, in `num_shards` shards; in none for a dense model. Blocks.

    model_dir, progress: as of `load_engine`.
    Raises CheckpointError, SetupError.
    """
    reader = open_checkpoint(model_dir)
    reader.check_names()
    dtype = torch_dtype(resolve_dtype(config.dtype, reader.config))
    device, num_experts = resolve_device(config.device), reader.config.num_experts
    quantization = quantization_on(config.of_experts, device, reader.config.stored_experts)
    plan = plan_evenly(reader.config.sparse_layers, num_experts, num_shards_for(num_experts, num_shards))
    reader.fetch(checkpoint_shapes(reader.config).keys() - dense_shapes(reader.config).keys(), progress)
    shards = {}
    for shard_id, experts in enumerate(plan.slices):
        shards[shard_id] = ExpertShard(shard_id, reader.config, dtype=dtype, device=device, quantization=quantization)
        shards[shard_id].load(reader, experts, progress)
    return ExpertDispatcher(LocalTransport(shards), FixedPlan(plan), metrics)


def share_here(experts: ExpertDispatcher) -> ShareAdapters:
    """With the shards that `local_experts` has made."""

    def share(wanted: AdapterList) -> None:
        assert isinstance(experts.transport, LocalTransport)
        for shard in experts.transport.shards.values():
            shard.adapt(wanted)

    return share
