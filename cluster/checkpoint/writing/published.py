"""The small files of a checkpoint as released models have them: config.json's keys, and those that are copied."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.checkpoint.added_tokens import TOKENIZER_FILE
from cluster.checkpoint.chat_template import TEMPLATE_DIR
from cluster.checkpoint.files import is_there
from cluster.checkpoint.generation import GENERATION_FILE
from cluster.checkpoint.made.drawn import SEED_KEY
from cluster.checkpoint.save_tokenizer import tokenizer_texts
from cluster.checkpoint.tokenizer_files import MERGES_FILE, VOCAB_FILE
from cluster.checkpoint.writing.folder import NewFolder
from cluster.config import ModelConfig
from cluster.errors import CheckpointError

log = logging.getLogger(__name__)

_COPIED = (
    GENERATION_FILE, "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.jinja", "chat_template.json", "LICENSE", "LICENSE.txt", "NOTICE",
)  # fmt: skip


def published_config(raw: Mapping[str, Any], dtype: str, **changes: Any) -> dict[str, Any]:
    """A config.json in the keys of released checkpoints, which transformers 4 and 5 both read; others stay.

    transformers 5 calls two of them otherwise: `dtype`, and `rope_parameters` for `rope_theta` and `rope_scaling`.
    changes: keys with other values; None leaves one out.
    """
    config = {key: value for key, value in raw.items() if key not in ("dtype", "rope_parameters", SEED_KEY)}
    rope = dict(raw.get("rope_parameters") or {})
    for key in ("rope_theta", "partial_rotary_factor"):
        if rope.get(key) is not None:
            config[key] = rope.pop(key)
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    if kind != "default":
        config["rope_scaling"] = {"type": kind} | {key: value for key, value in rope.items() if key != "type"}
    config |= {"torch_dtype": dtype, **changes}
    return {key: config[key] for key in sorted(config) if key not in changes or config[key] is not None}


def stored_name(name: str, config: ModelConfig) -> str:
    """The name under which transformers finds a tensor: the dense family's question answering alone calls its decoder
    otherwise. Source: transformers 5.24, Qwen2ForQuestionAnswering.base_model_prefix."""
    if config.model_type == "qwen2" and config.head.kind == "question_answering" and name.startswith("model."):
        return "transformer." + name.removeprefix("model.")
    return name


def copy_small_files(source: Path, folder: NewFolder) -> None:
    """Copies tokenizer, templates, generation defaults and licence, those that are there; the tokenizer gets the format
    that it lacks, tokenizer.json or vocab.json with merges.txt. Raises ClusterError."""
    for name in _COPIED:
        if is_there(source / name):
            folder.copy(source / name, name)
    for name, text in _other_format(source).items():
        with folder.create(name) as file:
            file.write(text.encode())
    for path in sorted((source / TEMPLATE_DIR).glob("*.jinja")):
        folder.copy(path, f"{TEMPLATE_DIR}/{path.name}")


def _other_format(source: Path) -> dict[str, str]:
    missing = [name for name in (TOKENIZER_FILE, VOCAB_FILE, MERGES_FILE) if not is_there(source / name)]
    if not missing:
        return {}
    try:
        texts = tokenizer_texts(source)
    except CheckpointError as error:  # weights are converted all the same
        log.warning("the tokenizer is copied as it is: %s", error)
        return {}
    return {name: texts[name] for name in missing if name in texts}


def write_json(folder: NewFolder, name: str, value: Mapping[str, Any]) -> None:
    """Raises ClusterError."""
    with folder.create(name) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
