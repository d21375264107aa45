"""Dataclasses that processes of different versions of this package exchange, as during a rollout.

A class travels by its *wire name*, a module and a class that both versions can import. The wire name stays when the
class moves: the module where it stood keeps a line that imports it from where it stands now.
tests/unit/test_wire_names.py freezes the names.
"""

import importlib
from collections.abc import Callable, Sequence
from copyreg import __newobj__ as new_object  # type: ignore[attr-defined]  # typeshed leaves it out
from dataclasses import MISSING, fields
from typing import Any, TypeVar

C = TypeVar("C", bound=type)


def evolving(module: str) -> Callable[[C], C]:
    """Pickles a dataclass's fields by name: a version ignores fields that it does not know, and gives those that it
    misses their default. A new field therefore needs a default. (With slots, dataclasses are pickled by the fields'
    order.)

    module: of the wire name.
    """

    def decorate(cls: C) -> C:
        for name, method in (("__reduce__", _reduce), ("__getstate__", _state), ("__setstate__", _set_state)):
            setattr(cls, name, method)
        return on_wire(module)(cls)

    return decorate


def on_wire(module: str, *, former: Sequence[str] = ()) -> Callable[[C], C]:
    """Gives a class its wire name only: for actors, whose class Ray sends to each process that calls them.

    former: methods that the class no longer has. Versions up to 0.1.0 send a class with the names of all its methods,
        private ones too, and a process that lacks one cannot read it.
    """

    def decorate(cls: C) -> C:
        cls.__module__ = module  # pickle and Ray read it
        for name in former:
            setattr(cls, name, _former)
        return cls

    return decorate


def sent(cls: C) -> C:
    """The class, ready to be pickled: its wire name gives it. (A class whose module is not imported would be sent by
    value, and come out as another one of the same name.)"""
    assert getattr(importlib.import_module(cls.__module__), cls.__name__) is cls
    return cls


def _former(self: object, *args: object, **options: object) -> None:
    raise AttributeError("this method was of an older version")


def _reduce(self: Any) -> tuple[Any, ...]:
    return new_object, (sent(type(self)),), self.__getstate__()


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
