"""A grammar at one sequence's end: which tokens may come next. Knows no thread. V: tokens of the model."""

import numpy as np
from llguidance import LLMatcher

from cluster.errors import InvalidRequest, RequestFailed
from cluster.grammar.source import refusal
from cluster.kernels.sampling.rule import Mask
from cluster.structured import Constraint


class GrammarState:
    """Used by one thread at a time."""

    def __init__(self, matcher: LLMatcher, constraint: Constraint) -> None:
        self._matcher = matcher
        self._constraint = constraint

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow but the end."""
        return bool(self._matcher.is_stopped())

    def accept(self, token_id: int) -> None:
        """Goes on by a token. Raises RequestFailed for one that may not come, InvalidRequest for a grammar that grows
        beyond its limits."""
        if self._matcher.is_stopped() and not self._matcher.is_error():
            raise RequestFailed(f"token {token_id} comes after the end of a grammar")
        if not self._matcher.consume_token(token_id):
            reason = self._matcher.get_error()
            if "doesn't satisfy" in reason:
                raise RequestFailed(f"token {token_id} does not satisfy its grammar: {reason.splitlines()[0]}")
            raise refusal(self._constraint, reason)

    def mask(self) -> Mask:
        """A bit for each token that may come next, the lowest first: [V / 32 or one more]. Releases the interpreter
        lock while it computes. Raises InvalidRequest for a grammar that grows beyond its limits."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.int32)
        if self._matcher.is_error():
            raise self._too_complex()
        return mask

    def _too_complex(self) -> InvalidRequest:
        return refusal(self._constraint, self._matcher.get_error())
