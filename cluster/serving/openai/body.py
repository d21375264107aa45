"""Bases of the bodies that come in and go out. A bad body costs no more time and memory than a good one."""

from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema


def _stop_at_first_fault(schema: Any) -> None:
    """Tells every list and dictionary of a schema, not of other models in it, to end at its first bad element."""
    if isinstance(schema, dict):
        if schema.get("type") in ("list", "dict"):
            schema["fail_fast"] = True
        for part in schema.values():
            _stop_at_first_fault(part)
    elif isinstance(schema, list | tuple):
        for part in schema:
            _stop_at_first_fault(part)


class RequestBody(BaseModel):
    """A body. An unknown field is refused by name, and a value of another type, as by OpenAI's server.

    Of a list with a million bad elements the first one is reported: pydantic would make an error of each, with 1.4 GB
    and 6 s for a body of one megabyte.
    """

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _stop_at_first_fault(schema)
        return schema

    @model_validator(mode="before")
    @classmethod
    def _with_one_stranger(cls, given: Any) -> Any:
        """Keeps the first of many unknown fields, which the error then names."""
        if not isinstance(given, dict) or len(given) <= len(cls.__pydantic_fields__) + 1:
            return given
        known = {field.alias or name for name, field in cls.__pydantic_fields__.items()}
        stranger = next(name for name in given if name not in known)
        return {name: value for name, value in given.items() if name in known or name == stranger}


class AnswerBody(BaseModel):
    model_config = ConfigDict(protected_namespaces=())
