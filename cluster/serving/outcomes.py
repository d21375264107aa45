"""Reads results of numbers out of updates, and makes of them what callers ask for. Knows no network."""

import numpy as np

from cluster.errors import ClusterError, RequestCancelled, Unavailable
from cluster.outcome import Activation, Numbers
from cluster.types import SequenceUpdate


def result_of(update: SequenceUpdate, name: str) -> Numbers | None:
    """The result that an update brings; None while its sequence is computed. Raises the update's error.

    name: of the request, for errors.
    """
    if update.error is not None:
        raise update.error
    if update.finish_reason == "cancelled":
        raise RequestCancelled(f"request {name} was cancelled by the server")
    if update.finish_reason == "error":
        raise ClusterError(f"request {name}: the engine reported an error without saying which")
    if update.token_ids:
        raise Unavailable(
            f"request {name}: its attention replica is of an older version, which gives tokens alone: send it again "
            "when `moe-cluster roll` is through"
        )
    if update.finish_reason is not None and update.numbers is None:
        raise ClusterError(f"request {name}: the engine ended it without its result")
    return update.numbers


def probabilities(logits: np.ndarray, activation: Activation) -> np.ndarray:
    """Of a prompt's labels, as transformers' pipeline has them: they sum to one, or each is by itself. [L] float32.

    For a regression the numbers are the model's own.
    """
    if activation == "none":
        return logits
    wide = logits.astype(np.float64)
    if activation == "sigmoid":
        wide = 0.5 * (1.0 + np.tanh(0.5 * wide))
    else:
        wide = np.exp(wide - wide.max())
        wide /= wide.sum()
    return wide.astype(np.float32)


def best_span(start_logits: np.ndarray, end_logits: np.ndarray) -> tuple[int, int]:
    """The positions of the first and the last token for which the two logits have the largest sum, the first not behind
    the last; of equal ones the earliest. Each is [T]."""
    best_starts = np.maximum.accumulate(start_logits)
    end = int(np.argmax(best_starts + end_logits))
    return int(np.argmax(start_logits[: end + 1])), end


def unit_vector(vector: np.ndarray) -> np.ndarray:
    """The vector divided by its Euclidean length, as torch's `normalize` does it; zeros stay zeros. [H] float32."""
    length = float(np.linalg.norm(vector.astype(np.float64)))
    return (vector / max(length, 1e-12)).astype(np.float32)
