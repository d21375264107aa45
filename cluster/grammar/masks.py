"""Computes the masks of a step's rows beside the step. Knows no model."""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

from cluster.grammar.state import GrammarState
from cluster.kernels.sampling.rule import Mask

_Outcome = dict[int, Mask | Exception]


class RowMasks:
    """The masks of a step, by row; computed at the latest when they are asked for."""

    def __init__(self, pending: list[Future[_Outcome]]) -> None:
        self._pending = pending
        self._found: _Outcome = {}

    def of(self, row: int) -> Mask | None:
        """A row's mask, None for a row without a grammar. Blocks. Raises the row's exception."""
        while self._pending:
            self._found |= self._pending.pop().result()
        found = self._found.get(row)
        if isinstance(found, Exception):
            raise found
        return found


class MaskThreads:
    """Used by one thread. num_threads: of its own; they run only while they compute."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="masks")

    @contextmanager
    def beside(self, states: Mapping[int, GrammarState]) -> Iterator[RowMasks]:
        """Begins with the masks of rows, and has ended with them when the context ends: then the states may go on."""
        rows = list(states.items())
        share = -(-len(rows) // self._num_threads)
        parts = [rows[first : first + share] for first in range(0, len(rows), share)] if rows else []
        pending = [self._threads.submit(_masks, part) for part in parts]
        try:
            yield RowMasks(list(pending))
        finally:
            wait(pending)


def _masks(rows: list[tuple[int, GrammarState]]) -> _Outcome:
    found: _Outcome = {}
    for row, state in rows:
        try:
            found[row] = state.mask()
        except Exception as error:  # noqa: BLE001 it is this row's alone
            found[row] = error
    return found
