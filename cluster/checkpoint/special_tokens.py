"""The special tokens that a checkpoint's small files name: which texts they are. Knows no ids but eos's origin.

Each rule is transformers' (tokenization_utils_base, 5.24), where files disagree too.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from cluster.checkpoint.files import is_there, read_json_object
from cluster.config.json_keys import shown
from cluster.errors import CheckpointError

TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE = "tokenizer_config.json", "special_tokens_map.json"
ADDED_DECODER = "added_tokens_decoder"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
DEFAULT_TOKEN = "<|endoftext|>"  # Qwen2Tokenizer's, where no file names another
_EXTRA, _ADDITIONAL = "extra_special_tokens", "additional_special_tokens"  # names of the same, the new one first
_OWN_NAMES = "model_specific_special_tokens"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def read_tokenizer_config(model_dir: Path) -> dict[str, Any]:
    """tokenizer_config.json; special_tokens_map.json goes before it, but only where it lists no added tokens.

    {} without them. Raises CheckpointError, also for a special token that is no text: an id in its place, say, would
    end nothing.
    """
    config = read_optional(model_dir / TOKENIZER_CONFIG_FILE)
    named = {} if ADDED_DECODER in config else read_optional(model_dir / SPECIAL_TOKENS_FILE)
    both = _settled(config, named)
    for name in SPECIAL_TOKENS:
        token = both.get(name)
        if token is not None and token_content(token) is None:
            file = SPECIAL_TOKENS_FILE if name in named else TOKENIZER_CONFIG_FILE
            raise CheckpointError(f"{model_dir / file}: {name} is {shown(token)}, the token's text is needed")
    return both


def _settled(config: dict[str, Any], named: dict[str, Any]) -> dict[str, Any]:
    """Both in one, with one key for the tokens without a name and one for those with a model's own. Changes both."""
    if _ADDITIONAL in config and not config.get(_EXTRA):
        config[_EXTRA] = config.pop(_ADDITIONAL)
    if isinstance(config.get(_EXTRA), list) and isinstance(named.get(_EXTRA), list):
        named[_EXTRA] = [*config[_EXTRA], *(token for token in named[_EXTRA] if token not in config[_EXTRA])]
    for source in (config, named):
        if isinstance(source.get(_EXTRA), Mapping):
            config[_OWN_NAMES] = {**_mapping(config.get(_OWN_NAMES)), **source.pop(_EXTRA)}
    both = config | named
    if _ADDITIONAL in both and _EXTRA not in both:
        both[_EXTRA] = both.pop(_ADDITIONAL)
    return both


def reads_as_qwen2(model_dir: Path, config: Mapping[str, Any]) -> bool:
    """Whether transformers takes `Qwen2Tokenizer`, which has tokens by default, and not tokenizer.json as it is."""
    raw = read_optional(model_dir / "config.json")
    named = config.get("tokenizer_class") or raw.get("tokenizer_class")
    if isinstance(named, str) and named.removesuffix("Fast") == "Qwen2Tokenizer":
        return True
    return raw.get("model_type") == "qwen2" or (raw.get("model_type") == "qwen2_moe" and named is None)


def named_tokens(config: Mapping[str, Any], *, qwen2: bool = True) -> dict[str, str | AddedToken]:
    """The special tokens by name, a model's own names too; chat templates read them.

    config: of `read_tokenizer_config`.  qwen2: of `reads_as_qwen2`.
    """
    defaults = dict.fromkeys(("eos_token", "unk_token", "pad_token"), DEFAULT_TOKEN) if qwen2 else {}
    specific = {
        **{k: v for k, v in config.items() if k.endswith("_token") and k not in SPECIAL_TOKENS and isinstance(v, str)},
        **_mapping(config.get(_OWN_NAMES)),
    }
    given = {**{name: config.get(name, defaults.get(name)) for name in SPECIAL_TOKENS}, **specific}
    return {name: token for name, value in given.items() if (token := as_token(value)) is not None}


def extra_tokens(model_dir: Path, config: Mapping[str, Any]) -> list[str | AddedToken]:
    """The special tokens without a name. Raises CheckpointError."""
    given = config.get(_EXTRA) or []
    tokens = [as_token(one) for one in given] if isinstance(given, list) else [None]
    found = [token for token in tokens if token is not None]
    if len(found) != len(tokens):
        path = model_dir / TOKENIZER_CONFIG_FILE
        raise CheckpointError(f"{path}: {_ADDITIONAL} is {shown(given)}, a list of tokens is needed")
    return found


def as_token(value: Any) -> str | AddedToken | None:
    """A token as a file spells it, a string or an object; None for anything else, and for an empty one."""
    content = token_content(value)
    if not content:
        return None
    return content if isinstance(value, str) else added_token({"special": True, **value})


def added_token(fields: Any) -> AddedToken | None:
    """A token's object with its flags; None for anything else."""
    content = token_content(fields)
    if not isinstance(fields, Mapping) or not content:
        return None
    given = {key: value for key in _FLAGS if (value := fields.get(key)) is not None}
    return AddedToken(content, **given) if all(isinstance(v, bool) for v in given.values()) else None


def token_content(token: Any) -> str | None:
    """Special tokens are given as a string or as an object with the string in it."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) and is_utf8(content) else None


def is_utf8(text: str) -> bool:
    """JSON can spell half a character: a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_optional(path: Path) -> dict[str, Any]:
    return read_json_object(path) if is_there(path) else {}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
