"""The OpenAPI document at `/openapi.json`: FastAPI's, with the keys, errors, streams and ranges that it cannot see."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from cluster.sampling_limits import LIMITS
from cluster.serving.openai.base_schema import LOWEST_SEED
from cluster.serving.openai.chat_schema import ChatChunk
from cluster.serving.openai.errors import ANTHROPIC_PATH, AnthropicError, OpenAIError
from cluster.serving.openai.messages_events import MessageEvent
from cluster.serving.openai.responses.events import ErrorEvent, ResponseEvent

Json = dict[str, Any]

STREAMED_MODELS = (ChatChunk, MessageEvent, ResponseEvent, ErrorEvent)
_METHODS = ("get", "post", "put", "delete", "patch")
_OF_ALL = {
    403: "the caller may not use this address",
    429: "the server is full, or a key has reached a limit; retry-after has the seconds",
    500: "an error inside; the message has the request's id",
    503: "a part is not up, or the server ends: send it again",
}
_WITH_KEY = {401: "no API key, or one that is not known"}
_WITH_NAME = {404: "no such model, or no such object"}
_WITH_QUERY = {400: "a value that can never succeed"}
_WITH_BODY = {
    400: "a body or a value that can never succeed",
    408: "the body did not come in time",
    413: "the body has too many bytes",
    415: "the body is no application/json",
    504: "a time budget has run out",
}
_TURNS = {"messages": [{"role": "user", "content": "Which experts answered?"}], "max_tokens": 16}
_EXAMPLES: Mapping[str, Json] = {
    "/v1/chat/completions": _TURNS,
    "/v1/messages": _TURNS,
    "/v1/responses": {"input": "Which experts answered?", "max_output_tokens": 16},
    "/v1/completions": {"prompt": "Experts are", "max_tokens": 16},
}
_UNCHECKED = ("HTTPValidationError", "ValidationError")  # FastAPI's own errors, which never leave the gate
# Here: all, an echo alone, the likeliest token, a seed as OpenAI has it.
_LOWEST = {"top_k": -1, "max_tokens": 0, "top_p": 0, "seed": LOWEST_SEED}


def describe(api: FastAPI, keyless: Callable[[str], bool], model_names: Callable[[], Sequence[str]]) -> None:
    """Makes an application describe itself with everything that its gate adds.

    keyless: returns whether a path needs no key.  model_names: by which bodies may ask for a model now, its first name
    first.
    """
    plain = api.openapi

    def openapi() -> Json:
        made = api.openapi_schema is not None
        document = plain()
        if not made:
            _complete(document, keyless, model_names()[0])
        schemas = document["components"]["schemas"]
        for name in _request_schemas(document):
            for kind in _kinds(schemas[name].get("properties", {}).get("model", {}), "string"):
                kind["enum"] = list(model_names())
        return document

    vars(api)["openapi"] = openapi


def _complete(document: Json, keyless: Callable[[str], bool], model_name: str) -> None:
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name in _UNCHECKED:
        schemas.pop(name, None)
    _, more = models_json_schema(
        [(model, "serialization") for model in (OpenAIError, AnthropicError, *STREAMED_MODELS)],
        ref_template="#/components/schemas/{model}",
    )
    schemas.update(more["$defs"])
    document["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    for path, operation in _operations(document):
        needs_key = not keyless(path)
        if needs_key:
            operation["security"] = [{"bearer": []}, {"x-api-key": []}, {}]  # the last: a server without keys
        if path in _EXAMPLES:
            operation["requestBody"]["content"]["application/json"]["example"] = _with_model(path, model_name)
        operation["responses"].pop("422", None)
        operation["responses"].update(_failures(path, operation, needs_key))
    for name in _request_schemas(document):
        _add_ranges(schemas[name].get("properties", {}))


def _with_model(path: str, name: str) -> Json:
    return {"model": name, **_EXAMPLES[path]}


def _operations(document: Mapping[str, Any]) -> Iterator[tuple[str, Json]]:
    for path, methods in document["paths"].items():
        yield from ((path, operation) for method, operation in methods.items() if method in _METHODS)


def _failures(path: str, operation: Mapping[str, Any], needs_key: bool) -> Json:
    has_body = "requestBody" in operation
    found = _OF_ALL | (_WITH_KEY if needs_key else {}) | (_WITH_BODY if has_body else {})
    if any(parameter["in"] == "query" for parameter in operation.get("parameters", ())):
        found = _WITH_QUERY | found
    if has_body or "{" in path:
        found |= _WITH_NAME
    model = AnthropicError if path.startswith(ANTHROPIC_PATH) else OpenAIError
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}
    return {str(status): {"description": text, "content": content} for status, text in sorted(found.items())}


def _request_schemas(document: Mapping[str, Any]) -> Iterator[str]:
    """The names of the bodies' schemas."""
    for _, operation in _operations(document):
        content = operation.get("requestBody", {}).get("content", {})
        for media in content.values():
            yield media["schema"]["$ref"].rpartition("/")[2]


def _add_ranges(fields: Mapping[str, Any]) -> None:
    """Writes the ranges of sampling parameters, which are checked after the types, into a body's fields."""
    for limits in LIMITS:
        for kind in _kinds(fields.get(limits.name, {}), "number", "integer"):
            above = limits.above and limits.name not in _LOWEST
            kind.setdefault("exclusiveMinimum" if above else "minimum", _LOWEST.get(limits.name, limits.low))
            kind.setdefault("maximum", limits.high)


def _kinds(field: Json, *types: str) -> list[Json]:
    """The schemas of a field's values that are of one of these types."""
    return [kind for kind in field.get("anyOf", [field]) if kind.get("type") in types]
