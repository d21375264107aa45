"""A checkpoint's facts as the engine's configuration takes them: dtype, context, and the model's description."""

from pathlib import Path
from typing import Any

from cluster.checkpoint.files import read_json_object
from cluster.checkpoint.generation import read_eos_token_ids
from cluster.checkpoint.model_files import served_name
from cluster.checkpoint.opening import open_checkpoint
from cluster.config import DTYPES, EngineConfig, ModelConfig
from cluster.errors import CheckpointError, SetupError
from cluster.types import ModelInfo


def resolve_dtype(dtype: str, config: ModelConfig) -> str:
    """The name of the dtype to compute in: "auto" is the checkpoint's. Raises CheckpointError where there is none."""
    if dtype == "auto" and config.dtype not in DTYPES:
        raise CheckpointError(
            f"config.json: dtype is {config.dtype}, which nothing here computes in: give dtype float32 "
            "(--dtype float32) or bfloat16, and the tensors are converted while they are read"
        )
    return config.dtype if dtype == "auto" else dtype


def max_model_len(config: ModelConfig, engine: EngineConfig) -> int:
    """The longest prompt and output together. Raises SetupError for more than the checkpoint allows."""
    limit = config.context_length
    if engine.max_model_len is not None and engine.max_model_len > limit:
        raise SetupError(
            f"max_model_len is {engine.max_model_len}, the checkpoint's context has {limit} tokens: rope_scaling "
            """(--rope-scaling '{"rope_type": "yarn", "factor": 2.0}') stretches it"""
        )
    return engine.max_model_len or limit


def model_info(model: str | Path, config: EngineConfig, model_id: str = "") -> ModelInfo:
    """Describes a checkpoint to clients, under its name or its directory's unless `model_id` gives another.

    Raises CheckpointError, SetupError.
    """
    reader = open_checkpoint(model, config.rope_scaling)
    return ModelInfo(
        model_id=model_id or served_name(model),
        vocab_size=reader.config.vocab_size,
        max_model_len=max_model_len(reader.config, config),
        num_hidden_layers=reader.config.num_hidden_layers,
        num_experts=reader.config.num_experts,
        num_experts_per_tok=reader.config.num_experts_per_tok,
        dtype=resolve_dtype(config.dtype, reader.config),
        eos_token_ids=read_eos_token_ids(reader.model_dir, reader.config),
        head=reader.config.head,
    )


def published_config(model_dir: Path) -> dict[str, Any]:
    """The model_type, the architectures, and the ids of the padding and the first token of a config.json, which may
    lack each. Raises CheckpointError."""
    raw = read_json_object(model_dir / "config.json")
    named = raw.get("architectures")
    ids = {name: raw.get(name) for name in ("pad_token_id", "bos_token_id")}
    return {
        "model_type": str(raw.get("model_type", "")),
        "architectures": tuple(filter(lambda one: isinstance(one, str), named if isinstance(named, list) else ())),
        **{name: value if isinstance(value, int) and 0 <= value < 2**31 else None for name, value in ids.items()},
    }
