"""Makes text of token ids while they come, and finds stop strings. Knows no requests and no network.

A byte-level token is a run of bytes, so the text so far is one UTF-8 stream: an incremental decoder decodes each token
once. An Aho-Corasick automaton finds the stop strings, one step for each character; its depth is the number of
characters that may still become a stop string, and are not shown yet.
"""

import codecs
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol


class TokenBytes(Protocol):
    """Gives a token's text; a `Tokenizer` does."""

    def token_bytes(self, token_id: int, skip_special_tokens: bool = True) -> bytes: ...


class NoText:
    """Gives no token a text: for models without a tokenizer."""

    def token_bytes(self, token_id: int, skip_special_tokens: bool = True) -> bytes:
        return b""


class StreamDetokenizer:
    """One sequence's text, piece by piece. Not thread-safe.

    The pieces that `push` and the last `flush` return make up `Tokenizer.decode` of the tokens, up to the
    stop string. Special tokens have no text, so no stop string matches them.

    The stop string is the one that is complete first, as if the text came one character at a time; of two
    that are complete at the same character, the longer. One that is complete before token number
    `min_tokens` is text.
    """

    def __init__(self, tokenizer: TokenBytes, *, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._matcher = _StopMatcher(stop) if stop else None
        self._min_tokens = min_tokens
        self._pending = ""
        self._stopped: str | None = None
        self._num_tokens = 0

    @property
    def stopped(self) -> str | None:
        """Returns the stop string that ended the text, None so far. Later tokens are ignored."""
        return self._stopped

    @property
    def num_tokens(self) -> int:
        """Returns how many pushed tokens belong to the answer: up to the one that completed the stop string, if any."""
        return self._num_tokens

    def push(self, token_ids: Iterable[int]) -> str:
        """Takes tokens and returns the text that is safe to show."""
        pieces = []
        for token_id in token_ids:
            if self._stopped is not None:
                break
            self._num_tokens += 1
            pieces.append(self._add(self._decoder.decode(self._tokenizer.token_bytes(token_id))))
        return "".join(pieces)

    def flush(self) -> str:
        """Returns the rest of the text at its end; an unfinished character becomes U+FFFD."""
        if self._stopped is not None:
            return ""
        text = self._add(self._decoder.decode(b"", final=True))
        text, self._pending = text + self._pending, ""
        return text

    def _add(self, text: str) -> str:
        """Returns the part of pending and new text that is safe to show; sets `stopped` at a stop string's end."""
        if self._matcher is None or not text:
            return text
        armed = self._num_tokens >= self._min_tokens
        num_pending = len(self._pending)
        text = self._pending + text
        for end in range(num_pending + 1, len(text) + 1):
            match = self._matcher.step(text[end - 1])
            if match is not None and armed:
                self._stopped, self._pending = match, ""
                return text[: end - len(match)]
        safe = len(text) - self._matcher.num_open
        self._pending = text[safe:]
        return text[:safe]


class _StopMatcher:
    """Aho-Corasick over a few strings. Mutates its state with each character.

    Node 0 is the root; a node stands for one prefix of a stop string. Source: Aho and Corasick, CACM 18
    (1975).
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._match: list[str | None] = [None]  # the longest stop string that ends at the node
        for text in stop:
            self._match[self._insert(text)] = text
        self._fail = [0] * len(self._next)
        self._link()
        self._state = 0

    @property
    def num_open(self) -> int:
        """Returns the length of the longest end of the text that may still become a stop string."""
        return self._depth[self._state]

    def step(self, char: str) -> str | None:
        """Takes one character and returns the longest stop string that it completes."""
        node = self._state
        while node and char not in self._next[node]:
            node = self._fail[node]
        node = self._next[node].get(char, 0)
        match = self._match[node]
        while node and not self._next[node]:  # a whole stop string that begins no longer one is not open
            node = self._fail[node]
        self._state = node
        return match

    def _insert(self, text: str) -> int:
        node = 0
        for char in text:
            if char not in self._next[node]:
                self._next[node][char] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[node] + 1)
                self._match.append(None)
            node = self._next[node][char]
        return node

    def _link(self) -> None:
        """Sets each node's `fail`, the node of its longest proper suffix, breadth first."""
        queue = deque(self._next[0].values())
        while queue:
            node = queue.popleft()
            for char, child in self._next[node].items():
                fail = self._fail[node]
                while fail and char not in self._next[fail]:
                    fail = self._fail[fail]
                self._fail[child] = self._next[fail].get(char, 0)
                if self._match[child] is None:
                    self._match[child] = self._match[self._fail[child]]
                queue.append(child)
