"""The tokens beside a tokenizer's vocabulary: which there are, and under which ids. Encodes nothing.

Each rule is transformers' (tokenization_utils_tokenizers, 5.24), where files disagree too. It asks nobody for an id,
though; here an id that a file gives, and that the vocabulary would not, is refused: its embedding is another one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from cluster.checkpoint.files import is_there, read_json_object, some
from cluster.checkpoint.special_tokens import (
    ADDED_DECODER,
    TOKENIZER_CONFIG_FILE,
    added_token,
    extra_tokens,
    is_utf8,
    named_tokens,
)
from cluster.config.json_keys import shown
from cluster.errors import CheckpointError

TOKENIZER_FILE, ADDED_TOKENS_FILE = "tokenizer.json", "added_tokens.json"
MAX_TOKEN_ID = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Added:
    """A token with its id, and the file that says so."""

    token: AddedToken
    token_id: int
    origin: str


def read_added_tokens(model_dir: Path, config: Mapping[str, Any], *, qwen2: bool) -> list[Added]:
    """The tokens that have an id in a file, by id: those of tokenizer_config.json's `added_tokens_decoder`, without it
    added_tokens.json's and tokenizer.json's, the latter's first. Raises CheckpointError."""
    if ADDED_DECODER in config:
        found = _of_decoder(model_dir / TOKENIZER_CONFIG_FILE, config[ADDED_DECODER])
    else:
        special = {str_of(token) for token in named_tokens(config, qwen2=qwen2).values()}
        special |= {str_of(token) for token in extra_tokens(model_dir, config)}
        found = _of_ids(model_dir / ADDED_TOKENS_FILE, special) | _of_tokenizer(model_dir / TOKENIZER_FILE)
    return [found[token_id] for token_id in sorted(found)]


def add_tokens(tokenizer: tokenizers.Tokenizer, model_dir: Path, config: Mapping[str, Any], *, qwen2: bool) -> None:
    """Adds them, and every special token that has no id in a file, after them. Raises CheckpointError."""
    with_id = read_added_tokens(model_dir, config, qwen2=qwen2)
    known = {added.token.content: added.token for added in with_id}
    named = [known.get(str_of(token), token) for token in named_tokens(config, qwen2=qwen2).values()]
    extra = extra_tokens(model_dir, config)
    _check_order(tokenizer, model_dir, [str_of(t) for t in (*named, *extra) if str_of(t) not in known])
    names = {str_of(token) for token in named}
    added = [token.token for token in with_id]
    for token in added:
        token.special = token.special or token.content in names
    present = {token.content for token in tokenizer.get_added_tokens_decoder().values()} | set(known)
    added += [_special(token) for token in (*named, *extra) if str_of(token) not in present]
    tokenizer.add_tokens(added)
    if qwen2:  # its last step makes them plain special tokens, whatever their flags
        tokenizer.add_tokens([AddedToken(str_of(token), special=True) for token in (*named, *extra)])
    for one in with_id:
        _check_id(tokenizer, one)


def str_of(token: str | AddedToken) -> str:
    return token if isinstance(token, str) else str(token.content)


def check_ids(path: Path, vocab: dict[str, Any]) -> dict[str, int]:
    """Raises CheckpointError for a token without an id."""
    wrong = [token for token, token_id in vocab.items() if not is_id(token_id) or not is_utf8(token)]
    if wrong:
        raise CheckpointError(f"{path}: {some(wrong, 'has', 'have')} no id, or is no text: download it again")
    return vocab


def is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_TOKEN_ID


def _of_decoder(path: Path, decoder: Any) -> dict[int, Added]:
    if not isinstance(decoder, Mapping):
        raise CheckpointError(f"{path}: {ADDED_DECODER} is {shown(decoder)}, an object is needed")
    found = {}
    for key, fields in decoder.items():
        token_id = int(key) if key.isascii() and key.isdigit() and len(key) < 12 else -1
        token = added_token(fields) if 0 <= token_id <= MAX_TOKEN_ID else None
        if token is None:
            raise CheckpointError(
                f"{path}: {ADDED_DECODER} has {shown(fields)} for {shown(key)}, a token for its id is needed"
            )
        found[token_id] = Added(token, token_id, f"{path}: {ADDED_DECODER}")
    return found


def _of_ids(path: Path, special: set[str]) -> dict[int, Added]:
    ids = check_ids(path, read_json_object(path)) if is_there(path) else {}
    return {
        token_id: Added(
            AddedToken(content, special=content in special, normalized=content not in special), token_id, str(path)
        )
        for content, token_id in ids.items()
        if content
    }


def _of_tokenizer(path: Path) -> dict[int, Added]:
    tokens = read_json_object(path).get("added_tokens") if is_there(path) else []
    found = {}
    for fields in tokens if isinstance(tokens, list) else []:
        token = added_token(fields)
        if token is not None and is_id(fields.get("id")):
            found[fields["id"]] = Added(token, fields["id"], str(path))
    return found


def _special(token: str | AddedToken) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True)
    token.special = True
    return token


def _check_order(tokenizer: tokenizers.Tokenizer, model_dir: Path, contents: list[str]) -> None:
    """One token without an id in any file comes after the vocabulary. With several their order is a guess: raises.

    A tokenizer.json has all of its tokens, so that others were added to it in transformers' order.
    """
    without = [content for content in dict.fromkeys(contents) if tokenizer.token_to_id(content) is None]
    if len(without) > 1 and not is_there(model_dir / TOKENIZER_FILE):
        raise CheckpointError(
            f"{model_dir / TOKENIZER_CONFIG_FILE}: {some(without, 'has', 'have')} no id in any file: put the "
            f"{TOKENIZER_FILE} of the model there that this one was made from"
        )


def _check_id(tokenizer: tokenizers.Tokenizer, added: Added) -> None:
    token_id = tokenizer.token_to_id(added.token.content)
    if token_id != added.token_id:
        raise CheckpointError(
            f"{added.origin} gives {shown(added.token.content)} the id {added.token_id}, with this vocabulary it is "
            f"{token_id}: the files belong to different tokenizers, download them again"
        )
