"""The form that an answer must have, as callers ask for it. Knows no grammar library and no tokenizer."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

from cluster import inputs
from cluster.errors import InvalidRequest

FIELD = "structured_outputs"
MAX_CHARS = 1 << 16  # of a schema, a pattern or a grammar: one with 2,000 properties has fewer
MAX_CHOICES = 4096
ONE_SPACE = " "
SPACE_OR_LINE = r" |\n {0,8}"  # as `json.dumps` writes, with and without an indent

Kind = Literal["json", "regex", "choice", "grammar"]
Constraint = tuple[Kind, str]  # on the wire: "json" with a schema, "choice" with a list of texts, both as JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """The form of an answer, with vLLM's names: exactly one of them is given.

    json: a JSON schema, as an object or as its text.  json_object: true for any JSON object.
    regex: a regular expression that the whole answer matches, in the syntax of Rust's `regex` crate: no look-around
    and no references back.  choice: texts, of which the answer is one.  grammar: in Lark's syntax with llguidance's
    additions, or in GBNF, as llama.cpp has it.
    Raises InvalidRequest.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Any = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        if self.json_object is not None and not inputs.truth_value(self.json_object, f"{FIELD}.json_object"):
            object.__setattr__(self, "json_object", None)
        given = [f.name for f in fields(self) if getattr(self, f.name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "empty"
            names = ", ".join(f.name for f in fields(self))
            raise InvalidRequest(f"{FIELD} is {found}, exactly one of {names} is needed", FIELD)
        if self.json is not None:
            object.__setattr__(self, "json", _schema(self.json))
        elif self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        elif self.json_object is None:
            inputs.text(getattr(self, given[0]), f"{FIELD}.{given[0]}")
        num_chars = len(self.constraint[1])
        if num_chars > MAX_CHARS:
            raise InvalidRequest(
                f"{FIELD}.{given[0]} has {num_chars} characters, at most {MAX_CHARS} are allowed", FIELD
            )

    @classmethod
    def of(cls, given: Any) -> Self:
        """Reads a mapping of the fields' names, too. Raises InvalidRequest."""
        if isinstance(given, cls):
            return given
        known = [f.name for f in fields(cls)]
        if not isinstance(given, Mapping):
            wanted = f"an object with one of {', '.join(known)}"
            raise InvalidRequest(f"{FIELD} is {inputs.shown(given)}, {wanted} is needed", FIELD)
        for name in given:
            if name not in known:
                raise InvalidRequest(f"{FIELD} has {inputs.shown(name)}; known: {', '.join(known)}", FIELD)
        return cls(**given)

    @property
    def constraint(self) -> Constraint:
        """Returns the form as an engine takes it."""
        if self.json_object:
            return "json", _schema({"type": "object"})
        if self.json is not None:
            return "json", str(self.json)
        if self.choice is not None:
            return "choice", json.dumps(self.choice, ensure_ascii=False)
        return ("regex", self.regex) if self.regex is not None else ("grammar", self.grammar or "")


def with_white_space(schema: Mapping[str, Any], pattern: str) -> Mapping[str, Any]:
    """A schema that allows no more white space between two of JSON's signs than the pattern, or none there.

    Without a bound a small model writes white space until `max_tokens`. Of the demo's model, asked at temperature 1 for
    an object of four members, 12 of 12 answers went on to 200 tokens with 32 characters, and none with SPACE_OR_LINE.
    A schema whose `x-guidance` has an option for it keeps that.
    """
    options = schema.get("x-guidance", {})
    if not isinstance(options, Mapping) or "whitespace_flexible" in options:  # a pattern would go before it
        return schema
    return {**schema, "x-guidance": {"whitespace_pattern": pattern, **options}}


def _schema(given: Any) -> str:
    """The schema's text, which bounds white space: an engine of another version keeps to the same form."""
    field = f"{FIELD}.json"
    try:
        schema = json.loads(inputs.text(given, field)) if isinstance(given, str) else given
        if isinstance(schema, Mapping):
            schema = with_white_space(schema, SPACE_OR_LINE)
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        text.encode()
    except RecursionError:
        raise InvalidRequest(f"{field} has too many lists and objects in one another", FIELD) from None
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"{field} is no JSON ({error}): {inputs.shown(given)}", FIELD) from error
    if not isinstance(schema, Mapping):
        raise InvalidRequest(f"{field} is {inputs.shown(schema)}, a JSON schema, which is an object, is needed", FIELD)
    return text


def _choices(given: Any) -> tuple[str, ...]:
    field = f"{FIELD}.choice"
    if isinstance(given, str):
        raise InvalidRequest(f"{field} is {inputs.shown(given)}, a list of texts is needed", FIELD)
    choices = inputs.texts(given, field, MAX_CHOICES)
    if not choices or "" in choices:
        raise InvalidRequest(f"{field} is {inputs.shown(choices)}, texts of at least one character are needed", FIELD)
    return choices
