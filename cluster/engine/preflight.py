"""Checks of a checkpoint before a process starts for it: JSON, the tokenizer, headers. Reads no tensor."""

from pathlib import Path

from cluster.checkpoint.adapters import open_adapter
from cluster.checkpoint.chat_template import read_chat_templates
from cluster.checkpoint.draft import check_draft
from cluster.checkpoint.generation import read_eos_token_ids, read_sampling_defaults
from cluster.checkpoint.info import max_model_len, resolve_dtype
from cluster.checkpoint.made.drawn import has_seed
from cluster.checkpoint.model_files import hub_name, open_files
from cluster.checkpoint.names import check_blocks, dense_shapes, expert_shapes
from cluster.checkpoint.opening import Checkpoint, open_checkpoint
from cluster.checkpoint.reader import read_config
from cluster.checkpoint.spans import check_groups, cuts_of
from cluster.checkpoint.special_tokens import read_tokenizer_config
from cluster.checkpoint.tokenizer_files import has_tokenizer, has_vocabulary, read_tokenizer
from cluster.checkpoint.weights import holds_weights
from cluster.config import EngineConfig, ModelConfig
from cluster.config.quantization import check_stored
from cluster.config.tensor_parallel import check_ranks, share_of, shares_of
from cluster.experts.placement import PlacementPlan, num_shards_for, plan_evenly
from cluster.model.cache_size import check_block_fits


def check_checkpoint(model: str | Path, engine: EngineConfig, num_shards: int, *, tokenizer: bool = True) -> Checkpoint:
    """Finds the faults that would end a start minutes later, at one node or at each. Returns the opened checkpoint.

    model: a directory, or a name on the hub, whose small files are fetched.
    tokenizer: whether requests will bring texts. Raises SetupError, CheckpointError.
    """
    reader = open_checkpoint(model, engine.rope_scaling)
    reader.check_tensors()
    _check_config(reader.model_dir, reader.config, engine, num_shards)
    if tokenizer:
        _check_tokenizer(reader.model_dir, with_vocabulary=True)
    return reader


def check_for_plan(model: str | Path, engine: EngineConfig, num_shards: int) -> ModelConfig:
    """As `check_checkpoint`, of what is there: config.json is enough. Raises SetupError, CheckpointError."""
    files = open_files(model)
    model_dir = files.directory
    if holds_weights(files) or has_seed(model_dir):
        return check_checkpoint(model, engine, num_shards, tokenizer=has_tokenizer(model_dir)).config
    _, config = read_config(model_dir, engine.rope_scaling)
    _check_config(model_dir, config, engine, num_shards)
    if has_tokenizer(model_dir):
        _check_tokenizer(model_dir, with_vocabulary=has_vocabulary(model_dir))
    return config


def adapter_bytes(config: ModelConfig, engine: EngineConfig) -> dict[str, tuple[int, int]]:
    """Bytes that each of the configured LoRA adapters takes in an attention replica, in all of its ranks together, and
    in all shards together. Raises CheckpointError.
    """
    dtype, found = resolve_dtype(engine.dtype, config), {}
    shares = shares_of(config, engine.tensor_parallel_size)
    for name, directory in (engine.lora_adapters or {}).items():
        adapter = open_adapter(directory, config, engine.max_lora_rank)
        of_ranks = [adapter.num_bytes(dtype, cuts=cuts_of(share, config)) for share in shares]
        dense = sum(of_ranks) if shares else adapter.num_bytes(dtype)
        found[name] = dense, adapter.num_bytes(dtype, experts=True)
    return found


def download_bytes(model: str | Path, plan: PlacementPlan) -> list[int]:
    """Bytes of the files that a process has to fetch on a node of its own: an attention replica, then each shard.

    Empty for a directory, and for a model without weights. Raises CheckpointError.
    """
    if hub_name(model) is None or not holds_weights(open_files(model)):
        return []
    reader = open_checkpoint(model)
    shards = [
        [name for layer_id, ids in layers.items() for i in ids for name in expert_shapes(reader.config, layer_id, i)]
        for layers in plan.slices
    ]
    return [reader.missing_bytes(names) for names in (list(dense_shapes(reader.config)), *shards)]


def _check_config(model_dir: Path, config: ModelConfig, engine: EngineConfig, num_shards: int) -> None:
    check_stored(engine.quantization, config.stored)
    check_stored(engine.of_experts, config.stored_experts)
    check_blocks(config, engine.quantization, engine.of_experts)
    plan_evenly(config.sparse_layers, config.num_experts, num_shards_for(config.num_experts, num_shards))
    check_ranks(config, engine)
    check_groups(config, engine.quantization, engine.tensor_parallel_size)
    largest = share_of(config, 0, engine.tensor_parallel_size).config
    check_block_fits(largest, engine, resolve_dtype(engine.dtype, config))
    adapter_bytes(config, engine)
    max_model_len(config, engine)
    check_draft(model_dir, config, engine)
    read_sampling_defaults(model_dir)
    read_eos_token_ids(model_dir, config)


def _check_tokenizer(model_dir: Path, *, with_vocabulary: bool) -> None:
    config = read_tokenizer_config(model_dir)
    if with_vocabulary:
        read_tokenizer(model_dir, config)
    read_chat_templates(model_dir, config)
