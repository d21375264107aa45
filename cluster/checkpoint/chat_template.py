"""Reads a checkpoint's chat template and compiles it, with the functions that transformers gives. Renders nothing."""

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cluster.checkpoint.files import in_one_line, is_there, read_text
from cluster.checkpoint.tokenizer_files import TOKENIZER_CONFIG_FILE
from cluster.errors import CheckpointError

TEMPLATE_FILE = "chat_template.jinja"


def read_chat_template(model_dir: Path, config: Mapping[str, Any]) -> jinja2.Template | None:
    """Compiles chat_template.jinja, else the config's `chat_template`: a string, or a list of named ones.

    config: tokenizer_config.json's. Raises CheckpointError.
    """
    file = model_dir / TEMPLATE_FILE
    if is_there(file):
        source: Any = read_text(file)
    else:
        file, source = model_dir / TOKENIZER_CONFIG_FILE, config.get("chat_template")
    if isinstance(source, Mapping):
        source = source.get("default")
    if isinstance(source, list):
        named = [t.get("template") for t in source if isinstance(t, Mapping) and t.get("name") == "default"]
        source = named[-1] if named else None
    if source is None:
        return None
    if not isinstance(source, str):
        raise CheckpointError(f"{file}: chat_template is {type(source).__name__}, a string is needed")
    try:
        return _environment().from_string(source)
    except (
        jinja2.TemplateError,
        ArithmeticError,
        LookupError,
        RecursionError,
        SyntaxError,
        TypeError,
        ValueError,
    ) as error:
        # Python raises the last ones, over the code that a template becomes: twenty nested loops, for example.
        raise CheckpointError(
            f"{file}: the chat template cannot be compiled: {type(error).__name__}: {in_one_line(error)}"
        ) from error


class _GenerationBlock(Extension):
    """Renders `{% generation %}…{% endgeneration %}`, training code's mark of answers, as its content."""

    tags = {"generation"}  # noqa: RUF012 as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """Source: transformers.utils.chat_template_utils, which every checkpoint's template is written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, loopcontrols],
        optimized=False,  # else compiling computes constants, even 9 ** 9 ** 9
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
