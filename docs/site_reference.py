"""For mkdocs: two pages that the code describes, the HTTP calls by its OpenAPI document, the commands by their parsers.

They are made when the site is built, so they cannot be of another version. On a forge the same is at `/openapi.json` of
a server and in `moe-cluster COMMAND --help`.
"""

import argparse
import re
from collections.abc import Iterator
from typing import Any
from unittest.mock import MagicMock

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from cluster import cli
from cluster.serving.openai.app import make_api

HTTP_HEAD = """# HTTP calls

The bodies of each call, from the OpenAPI document that a server has at `/openapi.json`. [HTTP](../http.md) explains the
fields, errors and limits. A body with a field that stands in no table is refused; a call that streams sends events of
the answer's parts."""
COMMANDS_HEAD = """# Options of the commands

What `moe-cluster COMMAND --help` prints. [Commands](../commands.md) has them in one table."""
BOUNDS = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
Json = dict[str, Any]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages."""
    for name, content in (("http", http_page(_document())), ("commands", commands_page(cli._parser()))):
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    return files


def _document() -> Json:
    """The OpenAPI document of a server; its calls are described, not made, so that no model is needed."""
    served = MagicMock()
    served.service.info.model_id, served.service.info.max_model_len = "MODEL", 1
    served.model_names = ("the served model's names",)
    served.now_s.return_value = 0.0
    return make_api(served).openapi()


def http_page(document: Json) -> str:
    """A section for each call with its body's and its answer's fields, then one for each object in them."""
    schemas: Json = document["components"]["schemas"]
    parts, bodies = [HTTP_HEAD, "## Calls"], set()
    for path, methods in document["paths"].items():
        for method, call in methods.items():
            body, answer = _body(call.get("requestBody", {})), _body(call["responses"].get("200", {}))
            bodies |= {body, answer}
            parts += [f"### {method.upper()} {path}", call.get("description", "")]
            for title, name in (("Body", body), ("Answer", answer)):
                if name in schemas:
                    parts += [f"{title}: {name}", _fields(schemas[name])]
    parts.append("## Objects in them")
    for name, schema in schemas.items():
        if name not in bodies and "ValidationError" not in name:
            parts += [f"### {name}", schema.get("description", ""), _fields(schema)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _body(content: Json) -> str:
    """The name of its object; empty where it has none."""
    return content.get("content", {}).get("application/json", {}).get("schema", {}).get("$ref", "").rpartition("/")[2]


def _fields(schema: Json) -> str:
    required = schema.get("required", [])
    rows = [
        f"| `{name}` | {_kind(field)} | {'yes' if name in required else ''} |"
        for name, field in schema.get("properties", {}).items()
    ]
    return "\n".join(["| field | type | required |", "| --- | --- | --- |", *rows]) if rows else ""


def _kind(field: Json) -> str:
    """A field's type in words; objects as links."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for key in ("anyOf", "oneOf"):
        if key in field:
            return " or ".join(dict.fromkeys(_kind(one) for one in field[key] if one.get("type") != "null"))
    if "const" in field or "enum" in field:
        return " or ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        return f"list of {_kind(field.get('items', {}))}"
    bounds = [f"{sign} {_number(field[key])}" for key, sign in BOUNDS if key in field]
    return ", ".join([field.get("type", "any"), *bounds])


def _number(bound: float) -> str:
    return f"{int(bound):,}" if float(bound).is_integer() else f"{bound:g}"


def commands_page(parser: argparse.ArgumentParser) -> str:
    """A section for each command, with the arguments, defaults and meanings of its help."""
    parts = [COMMANDS_HEAD]
    for each in _parsers(parser):
        rows = [_row(action) for action in each._actions if action.dest != "help"]
        table = ["| argument | default | meaning |", "| --- | --- | --- |", *rows] if rows else []
        parts += [f"## {each.prog}", each.description or "", "\n".join(table)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Those of all commands that run something."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield parser
    for action in below:
        for inner in action.choices.values():
            yield from _parsers(inner)


def _row(action: argparse.Action) -> str:
    names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar or action.dest}`"
    if action.option_strings and action.nargs != 0:
        names += f" {'|'.join(map(str, action.choices)) if action.choices else action.metavar or action.dest.upper()}"
    absent = action.default is None or action.default in ("", argparse.SUPPRESS) or action.nargs == 0
    default = "" if absent else f"`{action.default}`"
    meaning = re.sub(r" *\(default: (%\(default\)s|\S+)\)", "", action.help or "").replace("%%", "%")
    cells = [names, default, " ".join(meaning.split())]
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"
