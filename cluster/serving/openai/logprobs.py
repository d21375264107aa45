"""Log-probabilities in the shapes of OpenAI's two APIs. Knows no network."""

from collections.abc import Callable, Sequence
from itertools import accumulate

from cluster.serving.openai.chat_schema import ChoiceLogprobs, TokenLogprob, TopLogprob
from cluster.serving.openai.completion_schema import CompletionLogprobs
from cluster.types import Logprobs

LOWEST = -9999.0  # in place of minus infinity, which JSON does not have. Source: vLLM
TokenText = Callable[[int], bytes]  # a token's bytes


def as_token_ids(token_id: int) -> bytes:
    """A `TokenText` for clients that want a token's id in place of its text, which may be no text alone."""
    return f"token_id:{token_id}".encode()


def chat_logprobs(entries: Sequence[Logprobs], text_of: TokenText) -> ChoiceLogprobs:
    return ChoiceLogprobs(
        content=[
            TokenLogprob(
                **_token(entry.token_id, entry.logprob, text_of).model_dump(),
                top_logprobs=[_token(token_id, logprob, text_of) for token_id, logprob in entry.top],
            )
            for entry in entries
        ]
    )


def _token(token_id: int, logprob: float, text_of: TokenText) -> TopLogprob:
    raw = text_of(token_id)
    return TopLogprob(token=raw.decode(errors="replace"), logprob=max(logprob, LOWEST), bytes=list(raw))


def completion_logprobs(
    entries: Sequence[Logprobs | None],
    token_ids: Sequence[int],
    text_of: TokenText,
    first_offset: int,
    name_of: TokenText | None = None,
) -> CompletionLogprobs:
    """entries: of each token; None for the first of a prompt, which nothing precedes.
    first_offset: the characters of the text before the first token.  name_of: in place of tokens' texts.
    """
    texts, named = [token_text(token_id, text_of) for token_id in token_ids], name_of or text_of
    offsets = list(accumulate((len(text) for text in texts[:-1]), initial=first_offset)) if texts else []
    return CompletionLogprobs(
        tokens=texts if name_of is None else [token_text(token_id, name_of) for token_id in token_ids],
        token_logprobs=[None if entry is None else max(entry.logprob, LOWEST) for entry in entries],
        top_logprobs=[None if entry is None else _top(entry, named) for entry in entries],
        text_offset=offsets,
    )


def _top(entry: Logprobs, text_of: TokenText) -> dict[str, float]:
    """The likeliest tokens, and the chosen one where it is not among them. Two with one text share an entry."""
    found = {token_text(token_id, text_of): max(logprob, LOWEST) for token_id, logprob in reversed(entry.top)}
    return {**found, token_text(entry.token_id, text_of): max(entry.logprob, LOWEST)}


def token_text(token_id: int, text_of: TokenText) -> str:
    return text_of(token_id).decode(errors="replace")
