"""The fields with which HTTP requests ask for a form of the answer: OpenAI's `response_format`, and vLLM's."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from cluster.errors import InvalidRequest
from cluster.serving.openai.body import RequestBody
from cluster.structured import FIELD, StructuredOutputsParams

_GUIDED = {
    "guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar",
    "guided_json_object": "json_object",
}  # fmt: skip


class NamedSchema(RequestBody):
    """strict: taken and without effect: every schema is kept to."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextFormat(RequestBody):
    type: Literal["text"]


class ObjectFormat(RequestBody):
    type: Literal["json_object"]


class SchemaFormat(RequestBody):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


class FormFields(BaseModel):
    """structured_outputs: the fields of `StructuredOutputsParams`.  guided_*: vLLM's older names of the same."""

    response_format: ResponseFormat | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_json_object: bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    @property
    def form_field(self) -> str:
        """Returns the name of the field that asks for the form; `structured_outputs` for none."""
        if isinstance(self.response_format, ObjectFormat | SchemaFormat):
            return "response_format"
        return next((name for name in _GUIDED if getattr(self, name) not in (None, False)), FIELD)

    def form(self) -> StructuredOutputsParams | None:
        """The form that the answer must have, None for any. Raises InvalidRequest, also for several forms at once."""
        found: dict[str, StructuredOutputsParams] = {}
        match self.response_format:
            case ObjectFormat():
                found["response_format"] = StructuredOutputsParams(json_object=True)
            case SchemaFormat(json_schema=named):
                if named.schema_ is None:
                    raise InvalidRequest("response_format.json_schema has no schema", "response_format")
                with naming("response_format"):
                    found["response_format"] = StructuredOutputsParams(json=named.schema_)
        if self.structured_outputs is not None:
            found["structured_outputs"] = StructuredOutputsParams.of(self.structured_outputs)
        for name, field in _GUIDED.items():
            value = getattr(self, name)
            if value is not None and value is not False:
                with naming(name):
                    found[name] = StructuredOutputsParams(**{field: value})
        if len(found) > 1:
            other = next(name for name in found if name != FIELD)
            raise InvalidRequest(f"{' and '.join(found)} ask for a form each: give one", other)
        return next(iter(found.values()), None)


@contextmanager
def naming(field: str, of: str = FIELD) -> Iterator[None]:
    """Gives a refusal the name of the field that asked for it: a client may know no `structured_outputs`.

    of: the name that the refusal has.
    """
    try:
        yield
    except InvalidRequest as error:
        if error.field != of or field == of:
            raise
        raise InvalidRequest(re.sub(rf"^{of}(\.\w+)?", field, str(error)), field) from error
