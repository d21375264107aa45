"""The arguments of an `LLM` in the forms that it needs, or refused. Knows no model."""

import os
from collections.abc import Mapping

from cluster import inputs
from cluster.checkpoint.model_files import located
from cluster.config import TRANSPORTS
from cluster.errors import InvalidRequest, SetupError


def directories(adapters: Mapping[str, str | os.PathLike[str]] | None) -> dict[str, str] | None:
    """As `ClusterConfig` takes them, which checks them."""
    if not isinstance(adapters, Mapping):
        return adapters
    return {name: os.fspath(path) if isinstance(path, os.PathLike) else path for name, path in adapters.items()}


def check_transport(transport: object) -> None:
    if transport not in ("local", *TRANSPORTS):
        raise SetupError(f"transport is {transport!r}, one of local, {', '.join(TRANSPORTS)} is needed")


def checked(model_dir: object, num_expert_shards: object, skip_tokenizer: object) -> tuple[str, int, bool]:
    if not isinstance(model_dir, str | os.PathLike) or "\0" in os.fspath(model_dir):
        raise SetupError(f"model_dir is {inputs.shown(model_dir)}, a checkpoint's directory or its name is needed")
    try:
        num_shards = inputs.whole_number(num_expert_shards, "num_expert_shards")
        skip = inputs.truth_value(skip_tokenizer, "skip_tokenizer")
    except InvalidRequest as error:
        raise SetupError(str(error)) from None
    if num_shards < 0:
        raise SetupError(f"num_expert_shards is {inputs.shown(num_shards)}, at least 0 is needed")
    return located(model_dir), num_shards, skip
