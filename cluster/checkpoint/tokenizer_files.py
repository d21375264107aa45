"""Reads a checkpoint's tokenizer from whichever files hold it, as transformers' Qwen2Tokenizer does.

tokenizer.json, or vocab.json and merges.txt; tokens that only tokenizer_config.json or added_tokens.json have are
added, under the ids that they say. Encodes nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from cluster.checkpoint.files import in_one_line, is_there, read_json_object, read_text, some
from cluster.config.json_keys import shown
from cluster.errors import CheckpointError

TOKENIZER_FILE, TOKENIZER_CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
VOCAB_FILE, MERGES_FILE = "vocab.json", "merges.txt"
ADDED_TOKENS_FILE, SPECIAL_TOKENS_FILE = "added_tokens.json", "special_tokens_map.json"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
DEFAULT_TOKEN = "<|endoftext|>"  # Qwen2Tokenizer's, where no file names another
MAX_TOKEN_ID = 2**31 - 1
# Source: transformers.models.qwen2.tokenization_qwen2.
QWEN2_PRETOKENIZE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class TokenId:
    """A token's id, and its origin for messages."""

    token_id: int
    origin: str


@dataclass(frozen=True, slots=True)
class _Added:
    """A token beside the vocabulary. token_id: the one in its file; None for the next free one."""

    token: AddedToken
    token_id: int | None
    origin: str


def read_tokenizer_config(model_dir: Path) -> dict[str, Any]:
    """tokenizer_config.json over special_tokens_map.json; {} without them.

    Raises CheckpointError, also for a special token that is no text: an id in its place, say, would end nothing.
    """
    config = _read_optional(model_dir / TOKENIZER_CONFIG_FILE)
    named = {} if "added_tokens_decoder" in config else _read_optional(model_dir / SPECIAL_TOKENS_FILE)
    both = named | config
    for name in SPECIAL_TOKENS:
        token = both.get(name)
        if token is not None and token_content(token) is None:
            file = TOKENIZER_CONFIG_FILE if name in config else SPECIAL_TOKENS_FILE
            raise CheckpointError(f"{model_dir / file}: {name} is {shown(token)}, the token's text is needed")
    return both


def has_tokenizer(model_dir: Path) -> bool:
    """Whether any of its files is there."""
    return any(is_there(model_dir / name) for name in (TOKENIZER_FILE, VOCAB_FILE, MERGES_FILE, TOKENIZER_CONFIG_FILE))


def has_vocabulary(model_dir: Path) -> bool:
    """Whether any of the files is there that its tokens stand in."""
    return any(is_there(model_dir / name) for name in (TOKENIZER_FILE, VOCAB_FILE, MERGES_FILE))


def read_tokenizer(model_dir: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer without truncation and padding. config: of `read_tokenizer_config`.

    Raises CheckpointError for a missing or broken file, and for a tokenizer that is not byte-level, as Qwen2's is.
    """
    added = _added_tokens(model_dir, config)
    if is_there(model_dir / TOKENIZER_FILE):
        tokenizer = _from_json(model_dir / TOKENIZER_FILE)
        added = [token for token in added if token.token_id is not None]  # tokens without an id are in the file
    elif is_there(model_dir / VOCAB_FILE) and is_there(model_dir / MERGES_FILE):
        tokenizer = _from_vocabulary(model_dir, add_prefix_space=config.get("add_prefix_space") is True)
        _check_named(tokenizer, added)
    else:
        raise CheckpointError(
            f"{model_dir / TOKENIZER_FILE} is missing, and {VOCAB_FILE} with {MERGES_FILE} is not there instead: the "
            "checkpoint's tokenizer is read from them"
        )
    for token in added:
        _add(tokenizer, token)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def find_eos(model_dir: Path) -> TokenId | None:
    """The id of the token that the tokenizer ends a text with; None where there is none.

    Raises CheckpointError.
    """
    config = read_tokenizer_config(model_dir)
    content = token_content(config.get("eos_token", DEFAULT_TOKEN))
    if content is None:
        return None
    where = TOKENIZER_CONFIG_FILE if "eos_token" in config else "the tokenizer's default"
    for added in _added_tokens(model_dir, config):
        if added.token.content == content and added.token_id is not None:
            return TokenId(added.token_id, f"{model_dir / where}: eos_token")
    token_id = _find_in_vocabulary(model_dir, content)
    if token_id is None and not is_there(model_dir / TOKENIZER_FILE) and is_there(model_dir / MERGES_FILE):
        token_id = read_tokenizer(model_dir, config).token_to_id(content)  # it comes after the vocabulary
    return None if token_id is None else TokenId(token_id, f"{model_dir / where}: eos_token")


def token_content(token: Any) -> str | None:
    """Special tokens are given as a string or as an object with the string in it."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) and _is_utf8(content) else None


def _from_json(path: Path) -> tokenizers.Tokenizer:
    raw = read_json_object(path)
    if not _is_byte_level(raw.get("decoder")):
        raise CheckpointError(f"{path}: the decoder is not ByteLevel, only byte-level tokenizers are served")
    try:
        return tokenizers.Tokenizer.from_str(read_text(path))
    except BaseException as error:  # bare Exception for every fault, BaseException for a panic in Rust
        raise _broken(path, error) from error


def _from_vocabulary(model_dir: Path, *, add_prefix_space: bool) -> tokenizers.Tokenizer:
    """Source: transformers.models.qwen2.tokenization_qwen2.Qwen2Tokenizer."""
    vocab = _check_ids(model_dir / VOCAB_FILE, read_json_object(model_dir / VOCAB_FILE))
    merges = []
    for line in read_text(model_dir / MERGES_FILE).split("\n"):
        line = line.removesuffix("\r")
        if not line or line.startswith("#version"):
            continue
        pair = line.split(" ")
        if len(pair) != 2:
            raise CheckpointError(f"{model_dir / MERGES_FILE}: {shown(line)} is no merge of two: download it again")
        merges.append((pair[0], pair[1]))
    try:
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    except BaseException as error:
        raise _broken(model_dir / MERGES_FILE, error) from error
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PRETOKENIZE), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _added_tokens(model_dir: Path, config: Mapping[str, Any]) -> list[_Added]:
    """Tokens beside the vocabulary in the order in which they are added: by id, then those without one."""
    path = model_dir / TOKENIZER_CONFIG_FILE
    special = _special_tokens(path, config)
    found = []
    if "added_tokens_decoder" in config:
        decoder = config["added_tokens_decoder"]
        if not isinstance(decoder, Mapping):
            raise CheckpointError(f"{path}: added_tokens_decoder is {shown(decoder)}, an object is needed")
        for key, fields in decoder.items():
            token_id = int(key) if key.isascii() and key.isdigit() and len(key) < 12 else -1
            token = _added_token(fields) if 0 <= token_id <= MAX_TOKEN_ID else None
            if token is None:
                raise CheckpointError(
                    f"{path}: added_tokens_decoder has {shown(fields)} for {shown(key)}, a token for its id is needed"
                )
            found.append(_Added(token, token_id, f"{path}: added_tokens_decoder"))
    elif is_there(model_dir / ADDED_TOKENS_FILE):
        path = model_dir / ADDED_TOKENS_FILE
        for content, token_id in _check_ids(path, read_json_object(path)).items():
            token = AddedToken(content, special=content in special, normalized=content not in special)
            found.append(_Added(token, token_id, str(path)))
    found.sort(key=lambda added: added.token_id or 0)
    for added in found:
        added.token.special = added.token.special or added.token.content in special
    known = {added.token.content for added in found}
    return found + [
        _Added(AddedToken(content, special=True), None, str(path)) for content in special if content not in known
    ]


def _special_tokens(path: Path, config: Mapping[str, Any]) -> dict[str, None]:
    """Every token that the config names, in transformers' order."""
    more = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    if isinstance(more, Mapping):
        more = list(more.values())
    if not isinstance(more, list) or any(token_content(token) is None for token in more):
        raise CheckpointError(f"{path}: additional_special_tokens is {shown(more)}, a list of tokens is needed")
    defaults = dict.fromkeys(("eos_token", "unk_token", "pad_token"), DEFAULT_TOKEN)
    named = [token_content(config.get(name, defaults.get(name))) for name in SPECIAL_TOKENS]
    return dict.fromkeys(content for content in (*named, *map(token_content, more)) if content)


def _added_token(fields: Any) -> AddedToken | None:
    content = token_content(fields)
    if not isinstance(fields, Mapping) or not content:
        return None
    flags = {key: fields.get(key) for key in ("single_word", "lstrip", "rstrip", "normalized", "special")}
    given = {key: value for key, value in flags.items() if value is not None}
    return AddedToken(content, **given) if all(isinstance(v, bool) for v in given.values()) else None


def _add(tokenizer: tokenizers.Tokenizer, added: _Added) -> None:
    """Raises CheckpointError if the token would get another id than in its file, and so another embedding."""
    content = added.token.content
    if content not in {token.content for token in tokenizer.get_added_tokens_decoder().values()}:
        tokenizer.add_tokens([added.token])
    token_id = tokenizer.token_to_id(content)
    if added.token_id is not None and token_id != added.token_id:
        raise CheckpointError(
            f"{added.origin} gives {shown(content)} the id {added.token_id}, with this vocabulary it is {token_id}: "
            "the files belong to different tokenizers, download them again"
        )


def _check_named(tokenizer: tokenizers.Tokenizer, added: list[_Added]) -> None:
    """One token without an id in any file comes after the vocabulary. With several the order is unknown: raises."""
    with_id = {token.token.content for token in added if token.token_id is not None}
    without = [t.token.content for t in added if t.token_id is None and t.token.content not in with_id]
    without = [content for content in without if tokenizer.token_to_id(content) is None]
    if len(without) > 1:
        raise CheckpointError(
            f"{added[-1].origin}: {some(without, 'has', 'have')} no id in any file: put the {TOKENIZER_FILE} of the "
            "model there that this one was made from"
        )


def _find_in_vocabulary(model_dir: Path, content: str) -> int | None:
    if not is_there(model_dir / TOKENIZER_FILE):
        vocab: Any = _read_optional(model_dir / VOCAB_FILE)
    else:
        raw = read_json_object(model_dir / TOKENIZER_FILE)
        tokens, model = raw.get("added_tokens"), raw.get("model")
        for token in tokens if isinstance(tokens, list) else []:
            if isinstance(token, Mapping) and token.get("content") == content and _is_id(token.get("id")):
                return int(token["id"])
        vocab = model.get("vocab") if isinstance(model, Mapping) else None
    token_id = vocab.get(content) if isinstance(vocab, Mapping) else None
    return token_id if _is_id(token_id) else None


def _check_ids(path: Path, vocab: dict[str, Any]) -> dict[str, int]:
    wrong = [token for token, token_id in vocab.items() if not _is_id(token_id) or not _is_utf8(token)]
    if wrong or not vocab:
        reason = f"{some(wrong, 'has', 'have')} no id, or is no text" if wrong else "no token is in it"
        raise CheckpointError(f"{path}: {reason}: download it again")
    return vocab


def _is_utf8(text: str) -> bool:
    """JSON can spell half a character: a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_TOKEN_ID


def _is_byte_level(decoder: Any) -> bool:
    if not isinstance(decoder, Mapping):
        return False
    if decoder.get("type") == "Sequence":
        parts = decoder.get("decoders")
        return isinstance(parts, list) and len(parts) == 1 and _is_byte_level(parts[0])
    return decoder.get("type") == "ByteLevel"


def _broken(path: Path, error: BaseException) -> CheckpointError:
    if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
        raise error
    return CheckpointError(f"{path} cannot be read as a tokenizer: {in_one_line(error)}")


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json_object(path) if is_there(path) else {}
