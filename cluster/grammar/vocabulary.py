"""A tokenizer's tokens as llguidance takes them. Knows no sequence. V: tokens of the model, padding included."""

from collections.abc import Iterable, Mapping, Sequence

import tokenizers
from llguidance import LLTokenizer, TokenizerWrapper

from cluster.checkpoint.byte_level import byte_of_char


class _Tokens:
    """What `TokenizerWrapper` reads: each token's bytes, those of special tokens too, empty for padding."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, vocab_size: int, eos_token_id: int) -> None:
        added = tokenizer.get_added_tokens_decoder()
        chars = byte_of_char()
        self._tokenizer = tokenizer
        self.eos_token_id = eos_token_id
        self.bos_token_id = None
        self.special_token_ids = [i for i, token in added.items() if token.special and i < vocab_size]
        self.tokens: Sequence[bytes] = [
            _bytes(tokenizer.id_to_token(i), chars, added=i in added) for i in range(vocab_size)
        ]

    def __call__(self, text: str | bytes) -> list[int]:
        """For grammars that ask llguidance to choose tokens itself."""
        whole = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return list(self._tokenizer.encode(whole, add_special_tokens=False).ids)


def vocabulary(tokenizer: tokenizers.Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]) -> LLTokenizer:
    """tokenizer: byte-level.  vocab_size: V.  Blocks for 0.5 s with 152,000 tokens.

    A model without an EOS gets one of its own behind its tokens, which no mask shows it.
    """
    ends = [i for i in eos_token_ids if 0 <= i < vocab_size]
    size = vocab_size if ends else vocab_size + 1
    ends = ends or [vocab_size]
    return LLTokenizer(TokenizerWrapper(_Tokens(tokenizer, size, ends[0])), eos_token=ends)


def _bytes(token: str | None, chars: Mapping[str, int], *, added: bool) -> bytes:
    if token is None:
        return b""
    if added:
        return token.encode()
    try:
        return bytes(chars[char] for char in token)
    except KeyError:
        return token.encode()
