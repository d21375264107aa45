"""Reads a checkpoint's tokenizer from whichever files hold it, as transformers' Qwen2Tokenizer does.

tokenizer.json, or vocab.json and merges.txt; `added_tokens` adds the tokens beside the vocabulary. Encodes nothing.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from cluster.checkpoint.added_tokens import TOKENIZER_FILE, add_tokens, check_ids, is_id, read_added_tokens, str_of
from cluster.checkpoint.files import in_one_line, is_there, read_json_object, read_text
from cluster.checkpoint.special_tokens import (
    TOKENIZER_CONFIG_FILE,
    named_tokens,
    read_optional,
    read_tokenizer_config,
    reads_as_qwen2,
)
from cluster.config.json_keys import shown
from cluster.errors import CheckpointError

VOCAB_FILE, MERGES_FILE = "vocab.json", "merges.txt"
# Source: transformers.models.qwen2.tokenization_qwen2.
QWEN2_PRETOKENIZE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

Merges = list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class TokenId:
    """A token's id, and its origin for messages."""

    token_id: int
    origin: str


def has_tokenizer(model_dir: Path) -> bool:
    """Whether any of its files is there."""
    return has_vocabulary(model_dir) or is_there(model_dir / TOKENIZER_CONFIG_FILE)


def has_vocabulary(model_dir: Path) -> bool:
    """Whether any of the files is there that its tokens stand in."""
    return any(is_there(model_dir / name) for name in (TOKENIZER_FILE, VOCAB_FILE, MERGES_FILE))


def read_tokenizer(model_dir: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer without truncation and padding. config: of `read_tokenizer_config`.

    Raises CheckpointError for a missing or broken file, and for a tokenizer that is not byte-level, as Qwen2's is.
    """
    add_prefix_space = config.get("add_prefix_space") is True
    if is_there(model_dir / TOKENIZER_FILE):
        qwen2 = reads_as_qwen2(model_dir, config)
        tokenizer = _from_json(model_dir / TOKENIZER_FILE, qwen2=qwen2, add_prefix_space=add_prefix_space)
    elif is_there(model_dir / VOCAB_FILE) and is_there(model_dir / MERGES_FILE):
        qwen2 = True
        tokenizer = _from_vocabulary(model_dir, add_prefix_space=add_prefix_space)
    else:
        raise CheckpointError(
            f"{model_dir / TOKENIZER_FILE} is missing, and {VOCAB_FILE} with {MERGES_FILE} is not there instead: put "
            "the tokenizer's files there, or take token ids alone with skip_tokenizer (--skip-tokenizer)"
        )
    add_tokens(tokenizer, model_dir, config, qwen2=qwen2)
    if not is_there(model_dir / TOKENIZER_FILE):
        _add_ends(tokenizer, config)
    tokenizer.encode_special_tokens = config.get("split_special_tokens") is True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def find_eos(model_dir: Path) -> TokenId | None:
    """The id of the token that the tokenizer ends a text with; None where there is none.

    Raises CheckpointError.
    """
    config = read_tokenizer_config(model_dir)
    eos = named_tokens(config).get("eos_token")
    if eos is None:
        return None
    where = TOKENIZER_CONFIG_FILE if "eos_token" in config else "the tokenizer's default"
    for added in read_added_tokens(model_dir, config, qwen2=True):
        if added.token.content == str_of(eos):
            return TokenId(added.token_id, f"{model_dir / where}: eos_token")
    token_id = _find_in_vocabulary(model_dir, str_of(eos))
    if token_id is None and not is_there(model_dir / TOKENIZER_FILE) and is_there(model_dir / MERGES_FILE):
        token_id = read_tokenizer(model_dir, config).token_to_id(str_of(eos))  # it comes after the vocabulary
    return None if token_id is None else TokenId(token_id, f"{model_dir / where}: eos_token")


def qwen2_tokenizer(vocab: dict[str, int], merges: Merges, *, add_prefix_space: bool = False) -> tokenizers.Tokenizer:
    """The tokenizer of a vocabulary and its merges, without added tokens.

    Source: transformers.models.qwen2.tokenization_qwen2.Qwen2Tokenizer.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PRETOKENIZE), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _from_json(path: Path, *, qwen2: bool, add_prefix_space: bool) -> tokenizers.Tokenizer:
    """Reads tokenizer.json; as Qwen2Tokenizer without its added tokens, which `read_added_tokens` has.

    Where its pipeline is Qwen2's, the config decides on a space before the text, as in transformers. Another pipeline
    is taken as it stands: transformers 5 puts Qwen2's in its place, with which the model was not trained.
    """
    raw = read_json_object(path)
    if not _is_byte_level(raw.get("decoder")):
        raise CheckpointError(f"{path}: the decoder is not ByteLevel, only byte-level tokenizers are served")
    if qwen2:
        raw = {**raw, "added_tokens": []}
        if _is_qwen2_pipeline(raw):
            again = json.loads(qwen2_tokenizer({}, [], add_prefix_space=add_prefix_space).to_str())
            raw["pre_tokenizer"] = again["pre_tokenizer"]
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(raw) if qwen2 else read_text(path))
    except BaseException as error:  # bare Exception for every fault, BaseException for a panic in Rust
        raise _broken(path, error) from error


def _from_vocabulary(model_dir: Path, *, add_prefix_space: bool) -> tokenizers.Tokenizer:
    vocab = check_ids(model_dir / VOCAB_FILE, read_json_object(model_dir / VOCAB_FILE))
    if not vocab:
        raise CheckpointError(f"{model_dir / VOCAB_FILE}: no token is in it: download it again")
    merges: Merges = []
    for line in read_text(model_dir / MERGES_FILE).split("\n"):
        line = line.removesuffix("\r")
        if not line or line.startswith("#version"):
            continue
        pair = line.split(" ")
        if len(pair) != 2:
            raise CheckpointError(f"{model_dir / MERGES_FILE}: {shown(line)} is no merge of two: download it again")
        merges.append((pair[0], pair[1]))
    try:
        return qwen2_tokenizer(vocab, merges, add_prefix_space=add_prefix_space)
    except BaseException as error:
        raise _broken(model_dir / MERGES_FILE, error) from error


def _add_ends(tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Begins and ends every text with the tokens that a config without tokenizer.json asks for; Qwen2's asks for none.

    Source: transformers' `update_post_processor`.
    """
    named = named_tokens(config)
    begin, end = (
        [str_of(named[f"{name}_token"])] if config.get(f"add_{name}_token") is True and f"{name}_token" in named else []
        for name in ("bos", "eos")
    )
    if begin or end:
        ids = [(token, tokenizer.token_to_id(token)) for token in (*begin, *end)]
        tokenizer.post_processor = processors.TemplateProcessing(single=[*begin, "$A", *end], special_tokens=ids)


def _find_in_vocabulary(model_dir: Path, content: str) -> int | None:
    if not is_there(model_dir / TOKENIZER_FILE):
        vocab: Any = read_optional(model_dir / VOCAB_FILE)
    else:
        raw = read_json_object(model_dir / TOKENIZER_FILE)
        tokens, model = raw.get("added_tokens"), raw.get("model")
        for token in tokens if isinstance(tokens, list) else []:
            if isinstance(token, Mapping) and token.get("content") == content and is_id(token.get("id")):
                return int(token["id"])
        vocab = model.get("vocab") if isinstance(model, Mapping) else None
    token_id = vocab.get(content) if isinstance(vocab, Mapping) else None
    return token_id if is_id(token_id) else None


def _is_byte_level(decoder: Any) -> bool:
    if not isinstance(decoder, Mapping):
        return False
    if decoder.get("type") == "Sequence":
        parts = decoder.get("decoders")
        return isinstance(parts, list) and len(parts) == 1 and _is_byte_level(parts[0])
    return decoder.get("type") == "ByteLevel"


def _is_qwen2_pipeline(raw: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json normalizes and splits as Qwen2Tokenizer; the space before a text may differ."""
    mine = json.loads(qwen2_tokenizer({}, []).to_str())
    return all(plain_part(raw.get(part)) == plain_part(mine[part]) for part in ("normalizer", "pre_tokenizer"))


def plain_part(part: Any) -> Any:
    """A part of tokenizer.json without what changes no id: offsets, and how an option that is off is written.

    The space before a text is left out, too: tokenizer_config.json has it.
    """
    if isinstance(part, Mapping):
        skipped = ("trim_offsets", "add_prefix_space")
        return {key: plain_part(value) for key, value in part.items() if key not in skipped and value not in ("", None)}
    return [plain_part(one) for one in part] if isinstance(part, list) else part


def _broken(path: Path, error: BaseException) -> CheckpointError:
    if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
        raise error
    return CheckpointError(f"{path} cannot be read as a tokenizer: {in_one_line(error)}")
