"""Text to token ids and back, with the checkpoint's tokenizer and chat template. Knows no network.

Reads tokenizer.json, tokenizer_config.json and chat_template.jinja of a model directory. Used by `service`,
and by `detokenizer` through `token_bytes`. A Tokenizer is immutable after its construction and may be
called from several threads; encoding and decoding release the interpreter lock, rendering a template does not.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cluster.errors import CheckpointError, InvalidRequest
from cluster.types import ChatMessage

CHAT_ROLES = ("system", "user", "assistant", "tool")
MAX_CHAT_MESSAGES = 2048
MAX_RENDERED_CHARS = 8_000_000  # a template that multiplies its input is stopped here
_MAX_REASON_CHARS = 200
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# What template code can raise beside jinja2's own errors.
_RENDER_ERRORS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class Tokenizer:
    """The tokenizer of one checkpoint.

    Special tokens written out in a text ("<|im_end|>") are encoded as special tokens, also inside chat
    messages: this is Hugging Face's default behaviour.

    Raises CheckpointError when a file is missing, broken, or not byte-level (all qwen2_moe checkpoints are).
    """

    def __init__(self, model_dir: str | Path) -> None:
        self.model_dir = path = Path(model_dir)
        self._tokenizer = _load_tokenizer(path / "tokenizer.json")
        config = _load_config(path / "tokenizer_config.json")
        self._special_tokens = {
            name: content for name in _SPECIAL_TOKENS if (content := _token_content(config.get(name))) is not None
        }
        self._chat_template = _load_chat_template(path, config)
        self._special_ids = frozenset(
            token_id for token_id, token in self._tokenizer.get_added_tokens_decoder().items() if token.special
        )
        self._token_bytes: dict[tuple[int, bool], bytes] = {}

    @property
    def vocab_size(self) -> int:
        """Tokens with a text; a model's vocabulary may be larger by padding."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text, with what the tokenizer adds by itself (for Qwen: nothing)."""
        return self._encode(text, "text", add_special_tokens=True)

    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Returns the token ids of a conversation, up to where the assistant's answer begins.

        Raises InvalidRequest (field "chat") for no or too many messages, an unknown role, a template that
        raises, and a checkpoint without template.
        """
        return self._encode(self._render(messages), "chat", add_special_tokens=False)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of token ids; bytes that are not UTF-8 become U+FFFD, unknown ids nothing."""
        (text,) = self._tokenizer.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)
        return str(text)

    def token_bytes(self, token_id: int, skip_special_tokens: bool = True) -> bytes:
        """Returns what one token adds to the text's UTF-8 bytes: `decode` is their concatenation, decoded."""
        key = (token_id, skip_special_tokens)
        known = self._token_bytes.get(key)
        if known is None:
            known = self._token_bytes[key] = self._find_token_bytes(token_id, skip_special_tokens)
        return known

    def _find_token_bytes(self, token_id: int, skip_special_tokens: bool) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None or (skip_special_tokens and token_id in self._special_ids):
            return b""
        try:
            return bytes(_BYTE_OF_CHAR[char] for char in token)
        except KeyError:  # an added token that is written as itself
            return str(token).encode()

    def _encode(self, text: str, field: str, *, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"{field} is not valid UTF-8: it has a lone surrogate at character {error.start}", field
            ) from error
        # `encode` would hold the interpreter lock, 3.7 s for a megabyte; this one does not, and gives the same ids.
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encoding.ids)

    def _render(self, messages: Sequence[ChatMessage]) -> str:
        if self._chat_template is None:
            raise InvalidRequest("chat is not possible: the model has no chat template; send text instead", "chat")
        _check_messages(messages)
        rendered = self._chat_template.generate(
            messages=[{"role": m.role, "content": m.content} for m in messages],
            tools=None,
            documents=None,
            add_generation_prompt=True,
            **self._special_tokens,
        )
        try:
            return "".join(_bounded(rendered))
        except jinja2.TemplateError as error:
            reason = str(error.message or type(error).__name__)[:_MAX_REASON_CHARS]
            raise InvalidRequest(f"chat is refused by the model's chat template: {reason}", "chat") from error
        except _RENDER_ERRORS as error:
            raise InvalidRequest(
                f"chat cannot be rendered by the model's chat template ({type(error).__name__})", "chat"
            ) from error


def _check_messages(messages: Sequence[ChatMessage]) -> None:
    if not 1 <= len(messages) <= MAX_CHAT_MESSAGES:
        raise InvalidRequest(f"chat has {len(messages)} messages, 1 to {MAX_CHAT_MESSAGES} are allowed", "chat")
    for index, message in enumerate(messages):
        if message.role not in CHAT_ROLES:
            raise InvalidRequest(
                f"chat message {index} has the role {message.role[:40]!r}, one of {', '.join(CHAT_ROLES)} is needed",
                "chat",
            )


def _bounded(pieces: Iterator[str]) -> Iterator[str]:
    num_chars = 0
    for piece in pieces:
        num_chars += len(piece)
        if num_chars > MAX_RENDERED_CHARS:
            raise InvalidRequest(f"chat is over {MAX_RENDERED_CHARS} characters when rendered", "chat")
        yield piece


def _load_tokenizer(path: Path) -> tokenizers.Tokenizer:
    raw = _read_json(path)
    if raw is None:
        raise CheckpointError(f"{path} is missing: the checkpoint's tokenizer is read from it")
    if not _is_byte_level(raw.get("decoder")):
        raise CheckpointError(f"{path}: the decoder is not ByteLevel, only byte-level tokenizers are served")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception for every fault
        raise CheckpointError(f"{path} cannot be read as a tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _is_byte_level(decoder: Any) -> bool:
    if not isinstance(decoder, Mapping):
        return False
    if decoder.get("type") == "Sequence":
        parts = decoder.get("decoders")
        return isinstance(parts, list) and len(parts) == 1 and _is_byte_level(parts[0])
    return decoder.get("type") == "ByteLevel"


def _load_config(path: Path) -> dict[str, Any]:
    return _read_json(path) or {}


def _read_json(path: Path) -> dict[str, Any] | None:
    """Returns a JSON object, None where there is no file. Raises CheckpointError for a broken one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, an object is needed")
    return value


def _token_content(token: Any) -> str | None:
    """Special tokens are given as a string or as an object with the string in it."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else None


def _load_chat_template(path: Path, config: Mapping[str, Any]) -> jinja2.Template | None:
    """Compiles chat_template.jinja, else the config's `chat_template`: a string, or a list of named ones."""
    file = path / "chat_template.jinja"
    try:
        source: Any = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        file, source = path / "tokenizer_config.json", config.get("chat_template")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if isinstance(source, list):
        named = {t.get("name"): t.get("template") for t in source if isinstance(t, Mapping)}
        source = named.get("default")
    if source is None:
        return None
    if not isinstance(source, str):
        raise CheckpointError(f"{file}: chat_template is {type(source).__name__}, a string is needed")
    try:
        return _environment().from_string(source)
    except jinja2.TemplateError as error:
        raise CheckpointError(f"{file}: the chat template cannot be compiled: {error}") from error


class _GenerationBlock(Extension):
    """Renders `{% generation %}…{% endgeneration %}`, training code's mark of answers, as its content."""

    tags = {"generation"}  # noqa: RUF012 as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """Source: transformers.utils.chat_template_utils, which every checkpoint's template is written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _byte_of_char() -> Mapping[str, int]:
    """The byte of each character of a byte-level vocabulary. Source: GPT-2's bytes_to_unicode."""
    printable = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()
