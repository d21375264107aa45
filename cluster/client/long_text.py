"""Token ids of a text that may be longer than a server's requests: parts whose ids, joined, are those of the whole.

Knows no server: a function gives a part's ids.
"""

import unicodedata
from collections.abc import Callable, Iterator

from cluster.errors import InvalidRequest

PART_CHARS = 200_000  # of at most 4 bytes each: below max_request_bytes, 1 MiB unless the server has another
AROUND_CHARS = 512  # on each side of a cut, to see whether tokens cross it
TRIES = 64  # cuts for each part

Tokenize = Callable[[str], list[int]]


def tokenize_in_parts(text: str, tokenize: Tokenize, part_chars: int = PART_CHARS) -> list[int]:
    """The ids of a text. Raises InvalidRequest for one that cannot be cut, and what `tokenize` raises."""
    token_ids: list[int] = []
    begin = 0
    while len(text) - begin > part_chars:
        end = _cut(text, begin, begin + part_chars, tokenize)
        token_ids += tokenize(text[begin:end])
        begin = end
    return token_ids + tokenize(text[begin:])


def _cut(text: str, begin: int, end: int, tokenize: Tokenize) -> int:
    """The last place, `end` at most, that no token crosses."""
    for place, _ in zip(_places(text, begin, end), range(TRIES), strict=False):
        left, right = text[max(begin, place - AROUND_CHARS) : place], text[place : place + AROUND_CHARS]
        if tokenize(left + right) == tokenize(left) + tokenize(right):
            return place
    raise InvalidRequest(
        f"characters {begin:,} to {end:,} of the text cannot be cut without another token there, and the text is too "
        "long for one request: give --token-ids, or measure offline",
        "text",
    )


def _places(text: str, begin: int, end: int) -> Iterator[int]:
    """Places after a letter and before a space or sign, the last one first: a word seldom goes on there."""
    for place in range(end, begin, -1):
        after = text[place]
        if text[place - 1].isalpha() and not (after.isalnum() or unicodedata.category(after).startswith("M")):
            yield place
