"""Dataclasses that processes of different versions of this package exchange, as during a rollout."""

from dataclasses import MISSING, fields
from typing import Any, TypeVar

C = TypeVar("C", bound=type)


def evolving(cls: C) -> C:
    """Pickles a dataclass's fields by name: what a version does not know it ignores, what it misses has its default.

    A field that comes new therefore needs a default. (With slots, dataclasses are pickled by the fields' order.)
    """
    for name, method in (("__getstate__", _state), ("__setstate__", _set_state)):
        setattr(cls, name, method)
    return cls


def _state(self: Any) -> dict[str, Any]:
    return {field.name: getattr(self, field.name) for field in fields(self)}


def _set_state(self: Any, state: dict[str, Any]) -> None:
    for field in fields(self):
        if field.name in state:
            value = state[field.name]
        elif field.default is not MISSING:
            value = field.default
        elif field.default_factory is not MISSING:
            value = field.default_factory()
        else:
            raise TypeError(f"a {type(self).__name__} of another version has no {field.name}")
        object.__setattr__(self, field.name, value)
