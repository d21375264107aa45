"""Writes a checkpoint again as released ones lie: their names, one tensor for each matrix of an expert, one dtype."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cluster.checkpoint.info import resolve_dtype
from cluster.checkpoint.names import EMBEDDING, HEAD, checkpoint_shapes
from cluster.checkpoint.opening import Checkpoint, bring_here, open_checkpoint, open_pickled
from cluster.checkpoint.reader import read_config
from cluster.checkpoint.writing.model import MAX_FILE_BYTES, NewModel, Progress, Written, check_dtype, write_model
from cluster.checkpoint.writing.published import published_config, stored_name


def convert(
    source: str | Path,
    target: str | Path,
    *,
    dtype: str = "auto",
    max_file_bytes: int = MAX_FILE_BYTES,
    from_pickle: bool = False,
    progress: Progress | None = None,
) -> Written:
    """Writes the checkpoint `source`, a directory or a name on the hub, into the new or empty folder `target`.

    dtype: of all tensors; "auto" is the checkpoint's. from_pickle: read pytorch_model.bin and the like.
    Holds a few tensors at a time (`write_weights`); of embeddings that may be tied, both.
    Raises SetupError, CheckpointError before anything is written; ClusterError where writing fails.
    """
    check_dtype(dtype)
    checkpoint = open_pickled(source) if from_pickle else open_checkpoint(source)
    bring_here(checkpoint)
    raw, as_given = read_config(checkpoint.model_dir)
    chosen = resolve_dtype(dtype, checkpoint.config)
    config = checkpoint.config
    if as_given.tie_word_embeddings and not config.tie_word_embeddings and _is_head_embedding(checkpoint, chosen):
        config = replace(config, tie_word_embeddings=True)  # as training code saves it: one matrix, twice

    shapes = checkpoint_shapes(config)
    names = {stored_name(name, config): name for name in shapes}

    def fill(targets: Mapping[str, Tensor]) -> None:
        checkpoint.load({names[name]: target for name, target in targets.items()})

    model = NewModel(
        raw_config=published_config(raw, chosen, tie_word_embeddings=config.tie_word_embeddings),
        shapes={name: shapes[name_here] for name, name_here in names.items()},
        dtype=chosen,
        fill=fill,
        source=checkpoint.model_dir,
    )
    return write_model(Path(target), model, max_file_bytes=max_file_bytes, progress=progress)


def _is_head_embedding(checkpoint: Checkpoint, dtype: str) -> bool:
    """Whether the stored head is the embeddings again."""
    shape = (checkpoint.config.vocab_size, checkpoint.config.hidden_size)
    both = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name in (EMBEDDING, HEAD)}
    checkpoint.load(both)
    return torch.equal(both[EMBEDDING], both[HEAD])
