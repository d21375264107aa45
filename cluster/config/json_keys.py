"""Typed access to a checkpoint's JSON objects. Every refusal names the file, the key, its value and what is needed."""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.errors import CheckpointError

MAX_COUNT = 2**31 - 1  # two of them multiplied, times a dtype's bytes, still count as 64-bit numbers in torch


def shown(value: Any) -> str:
    """Any value for a message: in one line, cut where it is long."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring = 2, 60
    return short.repr(value)


@dataclass(frozen=True, slots=True)
class Keys:
    """A JSON object and where it stands; a null counts as missing. Raises CheckpointError for the key."""

    raw: Mapping[str, Any]
    where: str

    def count(self, key: str, default: int | None = None, *, at_least: int = 1, at_most: int = MAX_COUNT) -> int:
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
            raise self._wrong(key, value, f"a whole number from {at_least}")
        if value > at_most:
            raise self._wrong(key, value, f"{at_most:,} at most")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if not _is_positive(value):
            raise self._wrong(key, value, "a number above 0")
        return float(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of numbers above 0."""
        values = self._get(key, None)
        if not isinstance(values, list) or not all(_is_positive(item) for item in values):
            raise self._wrong(key, values, "a list of numbers above 0")
        return tuple(float(item) for item in values)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def ids(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers from 0, or one of them; missing is none."""
        value = self._get(key, [])
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in values):
            raise self._wrong(key, value, "a list of whole numbers from 0")
        return tuple(values)

    def names(self, key: str) -> tuple[str, ...]:
        """A list of texts; missing is none."""
        values = self._get(key, [])
        if not isinstance(values, list) or not all(isinstance(item, str) and item for item in values):
            raise self._wrong(key, values, "a list of names")
        return tuple(values)

    def has(self, key: str) -> bool:
        return self.raw.get(key) is not None

    def _get(self, key: str, default: Any) -> Any:
        value = self.raw.get(key)
        if value is not None:
            return value
        if default is None:
            raise CheckpointError(f"{self.where}: {key} is missing")
        return default

    def _wrong(self, key: str, value: Any, needed: str) -> CheckpointError:
        """value: the file's, or a default that follows from other keys."""
        return CheckpointError(f"{self.where}: {key} is {shown(value)}, {needed} is needed")


def _is_positive(value: Any) -> bool:
    # Compared before it is converted: a whole number of hundreds of digits does not fit a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e30
