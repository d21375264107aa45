"""Checks of a checkpoint before a process starts for it: JSON, the tokenizer, headers. Reads no tensor."""

from pathlib import Path

from cluster.checkpoint.chat_template import read_chat_template
from cluster.checkpoint.generation import read_eos_token_ids, read_sampling_defaults
from cluster.checkpoint.info import max_model_len, resolve_dtype
from cluster.checkpoint.opening import Checkpoint, open_checkpoint
from cluster.checkpoint.tokenizer_files import read_tokenizer, read_tokenizer_config
from cluster.config import EngineConfig
from cluster.experts.placement import num_shards_for, plan_evenly
from cluster.model.kv_cache import check_block_fits


def check_checkpoint(
    model_dir: str | Path, engine: EngineConfig, num_shards: int, *, tokenizer: bool = True
) -> Checkpoint:
    """Finds the faults that would end a start minutes later, at one node or at each. Returns the opened checkpoint.

    tokenizer: whether requests will bring texts. Raises SetupError, CheckpointError.
    """
    reader = open_checkpoint(model_dir)
    reader.check_tensors()
    num_experts = reader.config.num_experts
    plan_evenly(reader.config.sparse_layers, num_experts, num_shards_for(num_experts, num_shards))
    check_block_fits(reader.config, engine, resolve_dtype(engine.dtype, reader.config))
    max_model_len(reader.config, engine)
    read_sampling_defaults(model_dir)
    read_eos_token_ids(model_dir, reader.config)
    if tokenizer:
        config = read_tokenizer_config(reader.model_dir)
        read_tokenizer(reader.model_dir, config)
        read_chat_template(reader.model_dir, config)
    return reader
