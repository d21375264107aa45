"""Text to token ids and back, with the checkpoint's tokenizer and chat template. Knows no network.

`checkpoint/` reads the files. `work` encodes and decodes whole texts, `detokenizer` takes `token_bytes`. A Tokenizer
does not change and may be called from several threads; encoding and decoding release the interpreter lock, rendering a
template does not.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jinja2

from cluster.checkpoint.chat_template import read_chat_template
from cluster.checkpoint.tokenizer_files import SPECIAL_TOKENS, read_tokenizer, read_tokenizer_config, token_content
from cluster.errors import InvalidRequest
from cluster.types import ChatMessage

CHAT_ROLES = ("system", "user", "assistant", "tool")
MAX_CHAT_MESSAGES = 2048
MAX_RENDERED_CHARS = 8_000_000  # a template that multiplies its input is stopped here
_MAX_REASON_CHARS = 200
# Errors that template code can raise beside jinja2's.
_RENDER_ERRORS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class Tokenizer:
    """The tokenizer of one checkpoint.

    Special tokens written out in a text ("<|im_end|>") are encoded as special tokens, also inside chat
    messages: this is Hugging Face's default behaviour.

    Raises CheckpointError when a file is missing, broken, or not byte-level (as Qwen2's are).
    """

    def __init__(self, model_dir: str | Path) -> None:
        self.model_dir = path = Path(model_dir)
        config = read_tokenizer_config(path)
        self._tokenizer = read_tokenizer(path, config)
        self._special_tokens = {
            name: content for name in SPECIAL_TOKENS if (content := token_content(config.get(name))) is not None
        }
        self._chat_template = read_chat_template(path, config)
        self._special_ids = frozenset(
            token_id for token_id, token in self._tokenizer.get_added_tokens_decoder().items() if token.special
        )
        self._token_bytes: dict[tuple[int, bool], bytes] = {}

    @property
    def vocab_size(self) -> int:
        """Returns the number of tokens with a text; padding may make a model's vocabulary larger."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text, with those that the tokenizer adds by itself (for Qwen: none)."""
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
        """Returns the UTF-8 bytes that one token adds to the text: `decode` decodes all of them together."""
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


def _byte_of_char() -> Mapping[str, int]:
    """Returns the byte of each character of a byte-level vocabulary. Source: GPT-2's bytes_to_unicode."""
    printable = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()
