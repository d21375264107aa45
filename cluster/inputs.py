"""Turns callers' values into plain Python ones, or refuses them by field. Knows no request and no tensor library.

Numbers of NumPy and torch count as numbers; a truth value is no number, and bytes are neither a text nor token ids.
Every function raises InvalidRequest and nothing else.
"""

import ipaddress
import math
import operator
import re
from collections.abc import Iterable, Mapping, Set, Sized
from itertools import islice
from numbers import Real
from typing import Any

from cluster.errors import InvalidRequest

MAX_SHOWN_CHARS = 60
MAX_SHOWN_BITS = 256
MAX_NAME_CHARS = 253  # RFC 1035
_NAME = re.compile(r"(?!-)[\w-]{1,63}(\.(?!-)[\w-]{1,63})*\.?")  # letters of any language: resolvers know IDNA
MAX_PORT, MAX_PORT_DIGITS = 65535, 5
# Python raises these where it cannot turn a value into an int, or cannot iterate over it.
_REFUSALS = (TypeError, ValueError, OverflowError, RuntimeError, AttributeError)

CONTINUED = "continue_from"  # the field of the answer's tokens that its client has already


def shown(value: object) -> str:
    """Any value in short form, for an error message."""
    if isinstance(value, int) and value.bit_length() > MAX_SHOWN_BITS:
        return f"a whole number of {value.bit_length()} bits"  # Python writes none of over 4,300 digits
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 a foreign object's fault
        return f"a {type(value).__name__}"
    text = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}…"


def whole_number(value: Any, field: str) -> int:
    """The int of a Python, NumPy or torch integer; an array of one element is a list, not a number."""
    if not _is_truth_value(value):
        try:
            if not getattr(value, "ndim", 0):
                return operator.index(value)
        except _REFUSALS:
            pass
    raise InvalidRequest(f"{field} is {shown(value)}, a whole number is needed", field)


def is_whole_number(value: Any) -> bool:
    try:
        whole_number(value, "")
    except InvalidRequest:
        return False
    return True


def number(value: Any, field: str) -> float:
    """The float of a Python or NumPy number. NaN and the infinities are numbers here."""
    if isinstance(value, Real) and not _is_truth_value(value):
        try:
            return float(value)
        except OverflowError:
            return math.inf  # beyond every range, as the value is
        except _REFUSALS:
            pass
    raise InvalidRequest(f"{field} is {shown(value)}, a number is needed", field)


def is_port(text: str) -> bool:
    """Whether a text is the number of a port that one can connect to."""
    return text.isascii() and text.isdecimal() and len(text) <= MAX_PORT_DIGITS and 0 < int(text) <= MAX_PORT


def is_host(text: str) -> bool:
    """Whether a text can be the name of a machine or its address; of IPv6 with or without brackets."""
    bare = text[1:-1] if text[:1] == "[" and text[-1:] == "]" else text
    if ":" in bare:
        try:
            ipaddress.IPv6Address(bare)
        except ValueError:
            return False
        return True
    return bare is text and len(text) <= MAX_NAME_CHARS and _NAME.fullmatch(text) is not None


def truth_value(value: Any, field: str) -> bool:
    if _is_truth_value(value):
        return bool(value)
    raise InvalidRequest(f"{field} is {shown(value)}, true or false is needed", field)


def texts(value: Any, field: str, most: int) -> tuple[str, ...]:
    """The texts of a text, or of a list with up to `most` of them; none for None."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (text(value, field),)
    found = _elements(value, field, "a text or a list of texts", most + 1)
    if len(found) > most:
        raise InvalidRequest(f"{field} has {len(found)} strings, at most {most} are allowed", field)
    return tuple(text(one, field) for one in found)


def text(value: Any, field: str) -> str:
    """The value as a text that UTF-8 can encode."""
    if not isinstance(value, str):
        raise InvalidRequest(f"{field} has {shown(value)}, a text is needed", field)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{field} is not valid UTF-8: it has a lone surrogate at character {error.start}", field
        ) from error
    return str(value)


def token_ids(value: Any, field: str, most: int) -> tuple[int, ...]:
    """The ids of a list, a tuple, a range, an iterator, or a one-dimensional array or tensor; none for None.

    most: of an iterator so many are taken, and one more, which shows that it goes on.
    """
    if value is None:
        return ()
    ids = _elements(value, field, "a list of token ids", most + 1)
    if set(map(type, ids)) <= {int}:  # the usual case, and fast
        return tuple(ids)
    plain = []
    for position, token_id in enumerate(ids):
        try:
            plain.append(whole_number(token_id, field))
        except InvalidRequest:
            raise InvalidRequest(
                f"{field} has {shown(token_id)} at position {position}, a token's id is needed", field
            ) from None
    return tuple(plain)


def prompt_token_ids(value: Any, field: str, most: int) -> tuple[int, ...]:
    """As `token_ids`, but refuses None and sets, which have no order."""
    if value is None or isinstance(value, Set):
        raise InvalidRequest(f"{field} is {shown(value)}, a list of token ids is needed", field)
    return token_ids(value, field, most)


def listed(value: Any) -> Any:
    """The list (or number) of an array or a tensor; other values, bytes' views among them, unchanged."""
    if isinstance(value, type | memoryview) or not callable(getattr(value, "tolist", None)):
        return value
    try:
        return value.tolist()
    except _REFUSALS:
        return value


def is_series(value: object) -> bool:
    """Whether the value is an ordered collection; text, bytes, mappings and sets are none."""
    if isinstance(value, str | bytes | bytearray | memoryview | Mapping | Set) or not isinstance(value, Iterable):
        return False
    try:
        iter(value)  # an array without dimensions has the method and refuses
    except _REFUSALS:
        return False
    return True


def _elements(value: Any, field: str, wanted: str, most: int) -> list[Any]:
    """The elements of a collection; of an iterator, which may have no end, the first `most`."""
    value = listed(value)
    if not is_series(value) and not isinstance(value, Set):
        raise InvalidRequest(f"{field} is {shown(value)}, {wanted} is needed", field)
    parts: Iterable[Any] = value
    return list(parts if isinstance(value, Sized) else islice(parts, most))


def _is_truth_value(value: object) -> bool:
    return isinstance(value, bool) or (type(value).__name__ in ("bool_", "bool") and hasattr(value, "dtype"))
