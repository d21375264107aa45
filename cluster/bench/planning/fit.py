"""Turns timed steps into the curves of a calibration. Measures nothing."""

import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.bench.planning.steps import StepPoint
from cluster.errors import ClusterError
from cluster.planning.calibration import touched_experts
from cluster.planning.curve import Curve

SHORT_CONTEXT = 64  # tokens of a sequence whose attention takes next to nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionFit:
    """As of `Calibration`."""

    rows: Curve
    samples: Curve
    context_s: float
    shared: Curve


def fit_attention(points: Sequence[StepPoint]) -> AttentionFit:
    """Steps that begin a lone prompt, or have one row, give the curve against rows; decode steps of a short context the
    rest against sequences; those of a long one what a token in the cache costs. Raises ClusterError without these."""
    decode = _medians((p.work.rows, p) for p in points if _decodes(p) and p.work.context <= SHORT_CONTEXT * p.work.rows)
    prompts = _medians((p.work.rows, p) for p in points if p.work.samples == 1 and not p.work.context)
    if 1 not in decode or not prompts:
        raise ClusterError("too few steps were timed to learn from")
    context_s = _context_s(points)
    alone, context = decode[1]
    rows = Curve.through([(1, max(0.0, alone - context_s * context)), *((n, y) for n, (y, _) in prompts.items())])
    samples = [(n, max(0.0, y - context_s * context - rows.at(n))) for n, (y, context) in decode.items()]
    shared = _shared(points)
    return AttentionFit(rows=rows, samples=Curve.through(samples), context_s=context_s, shared=shared)


def fit_experts(points: Sequence[StepPoint], *, num_layers: int, num_experts: int, top_k: int) -> tuple[Curve, float]:
    """Seconds of the routed experts of all layers, on one shard, against rows; and of a layer's call without rows."""
    if not num_layers:
        return Curve(((1.0, 0.0),)), 0.0
    grouped: dict[int, list[float]] = {}
    for point in points:
        grouped.setdefault(point.work.rows, []).append(point.expert_s)
    curve = Curve.through([(rows, statistics.median(some)) for rows, some in grouped.items()])
    known = [[1.0, touched_experts(rows, num_experts, top_k), rows * top_k] for rows, _ in curve.points]
    call_s = least_squares(known, [seconds / num_layers for _, seconds in curve.points])[0]
    return curve, min(call_s, curve.points[0][1] / num_layers)


def least_squares(known: Sequence[Sequence[float]], wanted: Sequence[float]) -> list[float]:
    """The coefficients, none below zero, with the least relative error: the best of all subsets of the columns."""
    scale = 1.0 / np.maximum(np.asarray(wanted), 1e-9)
    matrix, target = np.asarray(known) * scale[:, None], np.asarray(wanted) * scale
    num_columns = matrix.shape[1]
    best, least = [0.0] * num_columns, float(target @ target)
    for size in range(1, num_columns + 1):
        for columns in itertools.combinations(range(num_columns), size):
            found, *_ = np.linalg.lstsq(matrix[:, columns], target, rcond=None)
            error = float(np.sum((matrix[:, columns] @ found - target) ** 2))
            if (found >= 0).all() and error < least:
                least, best = error, [0.0] * num_columns
                for column, value in zip(columns, found, strict=True):
                    best[column] = float(value)
    return best


def _medians(points: Iterable[tuple[int, StepPoint]]) -> dict[int, tuple[float, float]]:
    """Seconds without experts, and tokens of context, by key."""
    grouped: dict[int, list[StepPoint]] = {}
    for key, point in points:
        grouped.setdefault(key, []).append(point)
    found = {}
    for key, some in grouped.items():
        seconds = statistics.median(p.total_s - p.expert_s for p in some)
        found[key] = (seconds, statistics.median(p.work.context for p in some))
    return found


def _decodes(point: StepPoint) -> bool:
    return point.work.rows == point.work.samples and point.work.context > 0


def _context_s(points: Sequence[StepPoint]) -> float:
    """From decode steps of one batch with the longest and the shortest contexts."""
    decode = [p for p in points if _decodes(p)]
    longest = max(decode, key=lambda p: p.work.context, default=None)
    if longest is None:
        return 0.0
    same = [p for p in decode if p.work.rows == longest.work.rows]
    middle = longest.work.context / 2
    far, near = ([p for p in same if (p.work.context > middle) is is_far] for is_far in (True, False))
    if not far or not near:
        return 0.0
    seconds = [statistics.median(p.total_s - p.expert_s for p in some) for some in (far, near)]
    tokens = [statistics.median(p.work.context for p in some) for some in (far, near)]
    return max(0.0, (seconds[0] - seconds[1]) / (tokens[0] - tokens[1]))


def _shared(points: Sequence[StepPoint]) -> Curve:
    grouped: dict[int, list[float]] = {}
    for point in points:
        grouped.setdefault(point.work.rows, []).append(point.shared_s)
    return Curve.through([(rows, statistics.median(some)) for rows, some in grouped.items()])
