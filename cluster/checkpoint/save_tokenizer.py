"""Writes a checkpoint's tokenizer beside new weights: every format that transformers reads it from. Encodes nothing."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from cluster.checkpoint.added_tokens import TOKENIZER_FILE
from cluster.checkpoint.chat_template import DEFAULT_TEMPLATE, TEMPLATE_DIR, TEMPLATE_FILE, read_template_sources
from cluster.checkpoint.special_tokens import ADDED_DECODER, TOKENIZER_CONFIG_FILE, read_tokenizer_config
from cluster.checkpoint.tokenizer_files import (
    MERGES_FILE,
    VOCAB_FILE,
    has_vocabulary,
    plain_part,
    qwen2_tokenizer,
    read_tokenizer,
)
from cluster.errors import CheckpointError

_MERGES_HEADER = "#version: 0.2"


def save_tokenizer(model_dir: str | Path, out_dir: str | Path) -> list[Path]:
    """Writes the tokenizer of `model_dir` to `out_dir`, which it makes; returns the files, none for no tokenizer.

    tokenizer.json, and vocab.json with merges.txt as `Qwen2Tokenizer.save_vocabulary` writes them where they say all
    of it (a tokenizer.json with another way to split words has no such form); tokenizer_config.json, with every added
    token and its id; the chat templates, as files of their own. Files of these names are written anew.
    Raises CheckpointError.
    """
    out_dir = Path(out_dir)
    texts = tokenizer_texts(Path(model_dir))
    written = [out_dir / name for name in texts]
    try:
        for path, text in zip(written, texts.values(), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise CheckpointError(f"{error.filename or out_dir} cannot be written: {error.strerror}") from error
    return written


def tokenizer_texts(model_dir: Path) -> dict[str, str]:
    """The contents of these files by name; {} for no tokenizer. Raises CheckpointError."""
    if not has_vocabulary(model_dir):
        return {}
    config = read_tokenizer_config(model_dir)
    tokenizer = read_tokenizer(model_dir, config)
    templates = read_template_sources(model_dir, config)
    return {
        TOKENIZER_FILE: tokenizer.to_str(pretty=True),
        TOKENIZER_CONFIG_FILE: _json(_config(config, tokenizer)),
        **_vocabulary(tokenizer, config),
        **{_template_file(name): source for name, source in templates.items()},
    }


def _config(config: Mapping[str, Any], tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    added = sorted(tokenizer.get_added_tokens_decoder().items())
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        **{key: value for key, value in config.items() if key != "chat_template"},
        ADDED_DECODER: {str(i): {flag: getattr(token, flag) for flag in flags} for i, token in added},
    }


def _vocabulary(tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any]) -> dict[str, str]:
    """The texts of vocab.json and merges.txt; none where they would make another tokenizer."""
    written = json.loads(tokenizer.to_str())
    model = written["model"]
    pairs = [(left, right) for left, right in model.get("merges", ())]
    if model["type"] != "BPE" or any(" " in part or "\n" in part for pair in pairs for part in pair):
        return {}
    again = json.loads(
        qwen2_tokenizer(model["vocab"], pairs, add_prefix_space=config.get("add_prefix_space") is True).to_str()
    )
    if any(plain_part(written[part]) != plain_part(again[part]) for part in ("normalizer", "pre_tokenizer", "model")):
        return {}
    lines = [_MERGES_HEADER, *(" ".join(pair) for pair in pairs)]
    return {VOCAB_FILE: json.dumps(model["vocab"], ensure_ascii=False), MERGES_FILE: "\n".join(lines) + "\n"}


def _template_file(name: str) -> str:
    return TEMPLATE_FILE if name == DEFAULT_TEMPLATE else f"{TEMPLATE_DIR}/{name}.jinja"


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
