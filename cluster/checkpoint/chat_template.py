"""Reads a checkpoint's chat templates and compiles them, with the functions that transformers gives.

Renders nothing.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from cluster.checkpoint.files import check_directory, in_one_line, is_there, read_text
from cluster.checkpoint.special_tokens import TOKENIZER_CONFIG_FILE
from cluster.config.json_keys import shown
from cluster.errors import CheckpointError

TEMPLATE_FILE, TEMPLATE_DIR = "chat_template.jinja", "additional_chat_templates"
DEFAULT_TEMPLATE, TOOLS_TEMPLATE = "default", "tool_use"  # names that choose by themselves


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A template, ready to render, and its text."""

    source: str
    compiled: jinja2.Template


def read_template_sources(model_dir: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Every template's text by its name: a lone one is "default"; {} where there is none.

    chat_template.jinja and additional_chat_templates/*.jinja; without them tokenizer_config.json's `chat_template`, a
    string or named ones. (chat_template.json belongs to image processors, and transformers' tokenizers do not read it.)
    config: tokenizer_config.json's. Raises CheckpointError. Source: transformers.tokenization_utils_base.
    """
    found = {DEFAULT_TEMPLATE: model_dir / TEMPLATE_FILE} if is_there(model_dir / TEMPLATE_FILE) else {}
    if is_there(model_dir / TEMPLATE_DIR):
        check_directory(model_dir / TEMPLATE_DIR, "chat templates")
        more = sorted((model_dir / TEMPLATE_DIR).glob("*.jinja"))
        found |= {path.name.removesuffix(".jinja"): path for path in more}
    if found:
        return {name: read_text(path) for name, path in found.items()}
    return _named(model_dir / TOKENIZER_CONFIG_FILE, config.get("chat_template"))


def read_chat_templates(model_dir: Path, config: Mapping[str, Any]) -> dict[str, ChatTemplate]:
    """The same, compiled. Raises CheckpointError."""
    templates = {}
    for name, source in read_template_sources(model_dir, config).items():
        try:
            templates[name] = compile_template(source)
        except ValueError as error:
            raise CheckpointError(f"{model_dir}: the chat template {name!r} {error}") from error
    return templates


def compile_template(source: str) -> ChatTemplate:
    """Raises ValueError, with the reason in one line."""
    try:
        return ChatTemplate(source, _environment().from_string(source))
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
        raise ValueError(f"cannot be compiled: {type(error).__name__}: {in_one_line(error)}") from error


def _named(file: Path, source: Any) -> dict[str, str]:
    """Reads tokenizer_config.json's value."""
    if source is None:
        return {}
    if isinstance(source, str):
        return {DEFAULT_TEMPLATE: source}
    if isinstance(source, list) and all(isinstance(one, Mapping) for one in source):
        source = {one.get("name"): one.get("template") for one in source}
    if not isinstance(source, Mapping) or any(not isinstance(part, str) for pair in source.items() for part in pair):
        raise CheckpointError(f"{file}: chat_template is {shown(source)}, a string or named ones are needed")
    return dict(source)


class _GenerationBlock(Extension):
    """Renders `{% generation %}…{% endgeneration %}`, training code's mark of answers, as its content.

    The content is a block of its own, as in transformers: variables that are set in it end with it.
    """

    tags = {"generation"}  # noqa: RUF012 as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Macro) -> str:
        return caller()


class _Dict:
    """A template's `dict`, without the attributes of Python's type."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """A template's `namespace`, without names that lead into Python's insides."""

    def __init__(*args: Any, **values: Any) -> None:  # as jinja2's: a template's variable may be called self
        self, given = args[0], dict(*args[1:], **values)
        for name in given:
            _check_name(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no name that begins with _, as {name!r} does")


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
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
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
