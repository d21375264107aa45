"""A measured quantity against another one: straight lines between the points."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.inputs import shown


@dataclass(frozen=True, slots=True)
class Curve:
    """points: (x, y), x ascending. Beyond the last one the last line goes on; before the first one y stays."""

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        """Raises ValueError."""
        places = [x for x, _ in self.points]
        if not places or places != sorted(set(places)):
            raise ValueError(f"a curve has the places {shown(places)}: at least one, ascending, is needed")

    @classmethod
    def through(cls, points: Sequence[Sequence[float]]) -> "Curve":
        return cls(tuple(sorted((float(x), float(y)) for x, y in points)))

    def at(self, x: float) -> float:
        """Never below zero."""
        points = self.points
        if len(points) == 1 or x <= points[0][0]:
            return points[0][1]
        place = min(bisect_right(points, (x, float("inf"))), len(points) - 1)
        (x0, y0), (x1, y1) = points[place - 1], points[place]
        return max(0.0, y0 + (y1 - y0) * (x - x0) / (x1 - x0))
