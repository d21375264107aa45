"""A configuration's fields, each with its help text, default and limits: the command line and the documents read them.

Knows no field by name.
"""

import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal, TypeVar

from cluster import inputs
from cluster.errors import InvalidRequest, SetupError

T = TypeVar("T")

_DOC, _LIMITS = "doc", "limits"

# Upper limits: each is beyond any use, and below it nothing overflows.
MOST_CALLS = 1 << 30  # Ray Serve counts calls in 32 bits, and gets the sum of two such limits at most
MOST_SEQS = 1 << 16  # rows of a step: the logits of more, with Qwen's vocabulary, take over 40 GB
MOST_TOKENS = 1 << 24  # the longest known context is 10 M
MOST_BYTES = 1 << 50  # a million GB
MOST_MESSAGE_BYTES = (1 << 31) - 1  # gRPC counts a message's bytes in 32 bits


@dataclass(frozen=True, slots=True)
class Limits:
    """least, most: of a number.  choices: of a text; none: any text."""

    least: float
    most: float
    choices: Sequence[str]


def option(default: T, doc: str, *, least: float = -math.inf, most: float = math.inf, choices: Sequence[str] = ()) -> T:
    """Returns a dataclass field. doc: the meaning of a value, and of no value.  The rest: as in `Limits`."""
    metadata = {_DOC: doc, _LIMITS: Limits(least, most, choices)}
    made: T = field(default=default, metadata=metadata)
    return made


def required(doc: str) -> Any:
    """Returns a dataclass field without a default."""
    return field(metadata={_DOC: doc})


def doc_of(option: "Field[Any]") -> str:
    return str(option.metadata[_DOC])


def limits_of(option: "Field[Any]") -> Limits:
    limits = option.metadata.get(_LIMITS)
    return limits if isinstance(limits, Limits) else Limits(-math.inf, math.inf, ())


def defaults_of(config: type[Any]) -> dict[str, Any]:
    """Returns the defaults by the fields' names."""
    return {f.name: f.default for f in fields(config) if f.default is not MISSING}


def type_of(config: type[Any], name: str) -> type:
    """Returns the plain type of a field: int of `int | None`, str of a Literal."""
    return _plain_type(typing.get_type_hints(config)[name])


def _plain_type(hint: Any) -> type:
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) or _is_literal(hint) else (hint,)
    plain = next(part for part in parts if part is not type(None))
    plain = typing.get_origin(plain) or plain  # a mapping's keys and values have types as well
    return plain if isinstance(plain, type) else type(plain)


def _is_literal(hint: Any) -> bool:
    return typing.get_origin(hint) is Literal


def check(config: Any) -> None:
    """Checks each field by its type and limits; leaves plain ints and floats there. Raises SetupError."""
    hints = typing.get_type_hints(type(config))
    for f in fields(config):
        value, limits = getattr(config, f.name), limits_of(f)
        if value is None and f.default is None:
            continue
        kind = _plain_type(hints[f.name])
        if limits.choices:
            if value not in limits.choices:
                raise SetupError(f"{f.name} is {inputs.shown(value)}, one of {', '.join(limits.choices)} is needed")
        elif kind is bool:
            if not isinstance(value, bool):
                raise SetupError(f"{f.name} is {inputs.shown(value)}, true or false is needed")
        elif kind is Mapping:
            if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
                raise SetupError(f"{f.name} is {inputs.shown(value)}, an object with names is needed")
        elif kind in (int, float):
            object.__setattr__(config, f.name, _number(value, f.name, kind, limits))


def _number(value: Any, name: str, kind: type, limits: Limits) -> float:
    try:
        number = inputs.number(value, name) if kind is float else inputs.whole_number(value, name)
    except InvalidRequest as error:
        raise SetupError(str(error)) from None
    if not limits.least <= number <= limits.most or math.isinf(number):
        most = limits.most if isinstance(limits.most, int) else f"{limits.most:g}"
        upper = "" if limits.most == math.inf else f" and at most {most}"
        raise SetupError(f"{name} is {inputs.shown(number)}, at least {limits.least:g}{upper} is needed")
    return number


def typed(name: str, value: Any, hint: Any) -> Any:
    """Returns an untyped `value` as `hint` (int, float, str, Literal or one of these | None), an int as a float.

    Raises SetupError for a value of another type.
    """
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for part in parts:
        if part is type(None):
            if value is None:
                return None
        elif typing.get_origin(part) is Literal:
            if value in typing.get_args(part):
                return value
        elif part is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        elif isinstance(value, typing.get_origin(part) or part) and isinstance(value, bool) == (part is bool):
            return value
    names = " or ".join(getattr(p, "__name__", None) or "/".join(map(str, typing.get_args(p))) for p in parts)
    names = names.replace("NoneType", "null").replace("Mapping", "an object")
    raise SetupError(f"{name} is {value!r}, {names} is needed")
