"""The form of an answer that has to call tools: as `hermes` reads it, with arguments by the tools' schemas."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cluster import inputs
from cluster.errors import InvalidRequest
from cluster.structured import ONE_SPACE, StructuredOutputsParams, with_white_space

ANY_OBJECT = {"type": "object"}


def forced_calls(
    tools: Sequence[Mapping[str, Any]], name: str | None = None, *, several: bool = True
) -> StructuredOutputsParams:
    """Of one call at least. tools: in the form of the OpenAI API.  name: the one function to call, once; None: any.
    several: whether there may be more calls than one.

    Raises InvalidRequest.
    """
    functions = [_function(tool, f"tools[{index}]") for index, tool in enumerate(tools)]
    if name is not None:
        functions = [function for function in functions if function["name"] == name]
    if not functions:
        missing = "tools is empty" if name is None else f"tools has no function {inputs.shown(name)}"
        raise InvalidRequest(f"tool_choice asks for a call, and {missing}", "tool_choice")
    one_call = name is not None or not several
    lines = [
        '%llguidance {"no_forcing": true}',
        "start: call" if one_call else 'start: call ("\\n" call)*',
        f'call: "<tool_call>\\n" ({" | ".join(f"call_{i}" for i in range(len(functions)))}) "\\n</tool_call>"',
    ]
    for number, function in enumerate(functions):
        head = f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "arguments": '
        schema = function.get("parameters") or ANY_OBJECT
        lines.append(f'call_{number}: {json.dumps(head)} arguments_{number} "}}"')
        lines.append(f"arguments_{number}: %json {json.dumps(_of_object(schema), ensure_ascii=False)}")
    return StructuredOutputsParams(grammar="\n".join(lines))


def _function(tool: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    function = tool.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidRequest(f"{where} has no function with a name", "tools")
    if not isinstance(function.get("parameters") or {}, Mapping):
        raise InvalidRequest(f"{where} has parameters that are no JSON schema, which is an object", "tools")
    return function


def _of_object(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """A function's arguments are an object, though its schema may not say so."""
    kind = {} if "type" in schema or "$ref" in schema else ANY_OBJECT
    return with_white_space({**schema, **kind}, ONE_SPACE)
