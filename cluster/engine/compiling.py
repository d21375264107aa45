"""Sequences whose grammar is being compiled: they wait for it beside the queue. Knows no tensors."""

from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait

from cluster.engine.sequence import Sequence
from cluster.errors import InvalidRequest
from cluster.grammar.grammars import Grammars
from cluster.grammar.state import GrammarState
from cluster.structured import FIELD

POLL_S = 0.05  # when nothing else is to do the engine looks up so often


class Compiling:
    """Used by one thread. grammars: None for an engine that compiles none."""

    def __init__(self, grammars: Grammars | None) -> None:
        self._grammars = grammars
        self._pending: dict[Sequence, Future[GrammarState]] = {}

    def __len__(self) -> int:
        """May be called from any thread."""
        return len(self._pending)

    def begin(self, sequence: Sequence) -> None:
        """Raises InvalidRequest where there are no grammars."""
        request = sequence.request
        assert request.constraint is not None, "only a request with a constraint has a grammar"
        if self._grammars is None:
            raise InvalidRequest(f"{FIELD} is for models with a tokenizer, this engine has none", FIELD)
        self._pending[sequence] = self._grammars.begin(
            request.constraint, request.output_token_ids, request.num_continued
        )

    def take_ready(self) -> Iterator[tuple[Sequence, Exception | None]]:
        """Sequences that have their grammar now, or the exception that it met."""
        for sequence in [s for s, pending in self._pending.items() if pending.done()]:
            error = self._pending[sequence].exception()
            if error is not None and not isinstance(error, Exception):
                raise error
            if error is None:
                sequence.grammar = self._pending[sequence].result()
            del self._pending[sequence]
            yield sequence, error

    def remove(self, sequence: Sequence) -> bool:
        """Forgets a sequence; false if it is none of these."""
        pending = self._pending.pop(sequence, None)
        if pending is None:
            return False
        pending.cancel()  # one that runs already goes on, and nobody takes its grammar
        return True

    def wait(self) -> None:
        """Blocks for a moment, or until one is ready."""
        wait(list(self._pending.values()), POLL_S, FIRST_COMPLETED)
