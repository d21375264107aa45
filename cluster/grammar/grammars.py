"""Compiles grammars in threads of their own, and keeps those that are asked for again. Knows no engine."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import tokenizers
from llguidance import LLMatcher, LLTokenizer

from cluster.errors import ClusterError, InvalidRequest, RequestFailed
from cluster.grammar.source import grammar_of, limits, refusal
from cluster.grammar.state import GrammarState
from cluster.grammar.vocabulary import vocabulary
from cluster.inputs import CONTINUED
from cluster.structured import FIELD, Constraint

THREADS = 2  # one slow grammar holds up none
MAX_KEPT = 64  # compiled ones, about 1 MB each


class Grammars:
    """For one model. `begin` may be called from any thread.

    read_tokenizer: called when the first grammar comes, in a thread. It may raise ClusterError.
    vocab_size: of the model.
    """

    def __init__(
        self, read_tokenizer: Callable[[], tokenizers.Tokenizer], vocab_size: int, eos_token_ids: Sequence[int]
    ) -> None:
        self._read_tokenizer = read_tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="grammar")
        self._lock = threading.Lock()
        self._kept: OrderedDict[Constraint, LLMatcher] = OrderedDict()
        self._vocabulary: LLTokenizer | None = None
        self._reading = threading.Lock()

    def begin(self, constraint: Constraint, token_ids: Sequence[int], num_continued: int = 0) -> "Future[GrammarState]":
        """Compiles a grammar and takes the tokens in that an earlier attempt has brought.

        num_continued: of these, the first ones, which are the client's word.
        The future raises InvalidRequest for a grammar that cannot be used and a client's token that breaks it,
        ClusterError for a model without a tokenizer.
        """
        return self._threads.submit(self._state, constraint, tuple(token_ids), num_continued)

    def _state(self, constraint: Constraint, token_ids: Sequence[int], num_continued: int) -> GrammarState:
        state = GrammarState(self._matcher(constraint), constraint)
        for position, token_id in enumerate(token_ids):
            try:
                state.accept(token_id)
            except RequestFailed as error:
                if position >= num_continued:
                    raise
                raise InvalidRequest(f"{CONTINUED} at position {position}: {error}", CONTINUED) from error
        return state

    def _matcher(self, constraint: Constraint) -> LLMatcher:
        """A matcher at its beginning, which nobody else has."""
        with self._lock:
            kept = self._kept.get(constraint)
            if kept is not None:
                self._kept.move_to_end(constraint)
                return kept.deep_copy()
        matcher = LLMatcher(self._tokens(), grammar_of(constraint), limits=limits(), log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()  # finds a grammar that no text satisfies, and what the first step would wait for
        if matcher.is_error():
            raise refusal(constraint, matcher.get_error())
        if matcher.is_stopped():
            raise refusal(constraint, "it allows no answer but an empty one")
        with self._lock:
            self._kept[constraint] = matcher.deep_copy()
            if len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        return matcher

    def _tokens(self) -> LLTokenizer:
        with self._reading:
            if self._vocabulary is None:
                try:
                    tokenizer = self._read_tokenizer()
                except ClusterError as error:
                    raise InvalidRequest(f"{FIELD} needs the tokenizer, which is not there: {error}", FIELD) from error
                self._vocabulary = vocabulary(tokenizer, self._vocab_size, self._eos_token_ids)
            return self._vocabulary
