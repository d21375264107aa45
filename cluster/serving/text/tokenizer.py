"""Text to token ids and back, with the checkpoint's tokenizer and chat template. Knows no network.

`checkpoint/` reads the files, `rendering` renders chats. `work` encodes and decodes whole texts, `detokenizer` takes
`token_bytes`. A Tokenizer does not change and may be called from several threads; encoding and decoding release the
interpreter lock, rendering a template does not.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster.checkpoint.byte_level import byte_of_char
from cluster.checkpoint.save_tokenizer import save_tokenizer
from cluster.checkpoint.special_tokens import read_tokenizer_config
from cluster.checkpoint.tokenizer_files import read_tokenizer
from cluster.conversation import Conversation
from cluster.errors import InvalidRequest
from cluster.serving.text.rendering import ChatRenderer


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
        self._chat = ChatRenderer(path, config)
        self._special_ids = frozenset(
            token_id
            for token_id in self._tokenizer.get_added_tokens_decoder()
            if not self._tokenizer.decode([token_id], skip_special_tokens=True)
        )
        self._token_bytes: dict[tuple[int, bool], bytes] = {}

    @property
    def vocab_size(self) -> int:
        """Returns the number of tokens with a text; padding may make a model's vocabulary larger."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def has_chat_template(self) -> bool:
        return self._chat.has_templates

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """Returns the texts of the special tokens by their names, such as eos_token."""
        return self._chat.special_tokens

    @property
    def chat_template(self) -> str | None:
        """Returns the text of the template that a chat without tools gets."""
        return self._chat.default_source

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text, with those that the tokenizer adds by itself (for Qwen: none)."""
        return self._encode(text, "text", add_special_tokens=True)

    def encode_chat(self, chat: Conversation) -> list[int]:
        """Returns the token ids of a conversation. Raises InvalidRequest as `render`."""
        return self.encode_rendered(self.render(chat))

    def render(self, chat: Conversation) -> str:
        """Returns a conversation as text, as its chat template writes it.

        Raises InvalidRequest (field "chat") for a template that raises, and for a checkpoint without one.
        """
        return self._chat.render(chat)

    def encode_rendered(self, text: str) -> list[int]:
        """Returns the token ids of a rendered conversation: all its special tokens stand in the text."""
        return self._encode(text, "chat", add_special_tokens=False)

    def save(self, directory: str | Path) -> list[Path]:
        """Writes the tokenizer and its chat templates for transformers and others; returns the files.

        Raises CheckpointError.
        """
        return save_tokenizer(self.model_dir, directory)

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


_BYTE_OF_CHAR = byte_of_char()
