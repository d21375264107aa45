"""The checkpoint of a draft model: whether it can draft for another one. Reads no tensor."""

from pathlib import Path

from cluster.checkpoint.model_files import open_files
from cluster.checkpoint.names import dense_bytes, dense_shapes
from cluster.checkpoint.opening import open_checkpoint
from cluster.checkpoint.reader import read_config
from cluster.checkpoint.special_tokens import read_tokenizer_config
from cluster.checkpoint.tokenizer_files import has_vocabulary, read_tokenizer
from cluster.checkpoint.weights import holds_weights
from cluster.config import EngineConfig, ModelConfig
from cluster.config.speculation import FIELD
from cluster.errors import SetupError


def check_draft(model_dir: Path, config: ModelConfig, engine: EngineConfig) -> ModelConfig | None:
    """The draft model's configuration, if there is to be one; its config.json is enough.

    model_dir, config: of the model that it drafts for. Raises CheckpointError; SetupError where it cannot do that.
    """
    asked = engine.speculation
    if asked is None or asked.model is None:
        return None
    draft = _config_of(asked.model)
    if draft.num_experts or not draft.head.generates:
        kind = "routed experts" if draft.num_experts else f"no language model's head, but {draft.head}"
        raise SetupError(f"{FIELD}: the model {asked.model} has {kind}: a dense one that generates is needed")
    if draft.vocab_size != config.vocab_size:
        raise SetupError(
            f"{FIELD}: the model {asked.model} has a vocabulary of {draft.vocab_size:,} tokens, and the one that is "
            f"served has {config.vocab_size:,}: a draft model of the same vocabulary is needed"
        )
    _check_tokens(asked.model, open_files(asked.model).directory, model_dir)
    return draft


def draft_bytes(engine: EngineConfig) -> int:
    """Bytes that a replica downloads and reads for the draft model, 0 without one. Raises CheckpointError."""
    asked = engine.speculation
    if asked is None or asked.model is None:
        return 0
    reader = open_checkpoint(asked.model)
    return reader.missing_bytes(dense_shapes(reader.config)) + dense_bytes(reader.config, reader.config.dtype)


def _config_of(model: str) -> ModelConfig:
    files = open_files(model)
    if not holds_weights(files):
        return read_config(files.directory)[1]
    reader = open_checkpoint(model)
    reader.check_tensors()
    return reader.config


def _check_tokens(name: str, draft_dir: Path, model_dir: Path) -> None:
    """Compares what the ids stand for, where both models have a tokenizer."""
    if not has_vocabulary(draft_dir) or not has_vocabulary(model_dir):
        return
    draft, model = (
        read_tokenizer(folder, read_tokenizer_config(folder)).get_vocab() for folder in (draft_dir, model_dir)
    )
    others = {token_id: token for token, token_id in draft.items()}
    for token, token_id in model.items():
        if token_id in others and others[token_id] != token:
            raise SetupError(
                f"{FIELD}: token {token_id} of the model {name} is {others[token_id]!r}, and of the one that is served "
                f"{token!r}: a draft model of the same vocabulary is needed"
            )
