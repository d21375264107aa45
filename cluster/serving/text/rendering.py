"""Renders conversations with a checkpoint's chat templates, as transformers does. Knows no tokens and no processes.

A template is a program of the checkpoint's: it may be slow, and its memory has no bound here (`template_worker`).
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from cluster.checkpoint.added_tokens import str_of
from cluster.checkpoint.chat_template import (
    DEFAULT_TEMPLATE,
    TOOLS_TEMPLATE,
    ChatTemplate,
    compile_template,
    read_chat_templates,
)
from cluster.checkpoint.files import in_one_line
from cluster.checkpoint.special_tokens import named_tokens, read_tokenizer_config, reads_as_qwen2
from cluster.conversation import Conversation, Json
from cluster.errors import InvalidRequest

MAX_RENDERED_CHARS = 8_000_000  # a template that multiplies its input is stopped here
# Errors that template code can raise beside jinja2's.
_RENDER_ERRORS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
_REASONING = ("reasoning_content", "thinking", "reasoning")
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # transformers' own: a template that looks at its input sees the same


class ChatRenderer:
    """The chat templates of one checkpoint. May be called from several threads. Raises CheckpointError."""

    def __init__(self, model_dir: Path, config: Mapping[str, Any] | None = None) -> None:
        """config: of `read_tokenizer_config`, where it is read already."""
        config = read_tokenizer_config(model_dir) if config is None else config
        self._templates = read_chat_templates(model_dir, config)
        named = named_tokens(config, qwen2=reads_as_qwen2(model_dir, config))
        self._special_tokens = {name: str_of(token) for name, token in named.items()}

    @property
    def has_templates(self) -> bool:
        return bool(self._templates)

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """Returns the texts of the special tokens by their names, as templates see them."""
        return self._special_tokens

    @property
    def default_source(self) -> str | None:
        """Returns the text of the template that a chat without tools gets."""
        template = self._templates.get(DEFAULT_TEMPLATE)
        return None if template is None else template.source

    def render(self, chat: Conversation) -> str:
        """Returns the text that the model gets. Raises InvalidRequest (field "chat").

        Source: transformers.utils.chat_template_utils.render_jinja_template.
        """
        template = self._choose(chat)
        messages, ending = chat.messages, ""
        if chat.continue_final_message:
            messages, ending = _left_open(template, chat)
        variables = {
            **self._special_tokens,
            **chat.template_kwargs,
            "messages": messages,
            "tools": chat.tools,
            "documents": chat.documents,
            "add_generation_prompt": chat.add_generation_prompt,
        }
        try:
            rendered = "".join(_bounded(template.compiled.generate(variables)))
        except jinja2.TemplateError as error:
            reason = in_one_line(error.message or type(error).__name__)
            raise InvalidRequest(f"chat is refused by the model's chat template: {reason}", "chat") from error
        except _RENDER_ERRORS as error:
            raise InvalidRequest(_why_not(error, chat), "chat") from error
        return _cut(rendered, ending) if chat.continue_final_message else rendered

    def _choose(self, chat: Conversation) -> ChatTemplate:
        """Source: transformers' `get_chat_template`."""
        named = self._templates
        if chat.chat_template is not None:
            if chat.chat_template in named:
                return named[chat.chat_template]
            try:
                return compile_template(chat.chat_template)
            except ValueError as error:
                raise InvalidRequest(f"chat_template {error}", "chat_template") from error
        if chat.tools is not None and TOOLS_TEMPLATE in named:
            return named[TOOLS_TEMPLATE]
        if DEFAULT_TEMPLATE in named:
            return named[DEFAULT_TEMPLATE]
        if not named:
            raise InvalidRequest("chat is not possible: the model has no chat template; send text instead", "chat")
        raise InvalidRequest(
            f"chat needs the name of a template, the model has {', '.join(sorted(named))} and no default",
            "chat",
        )


def _left_open(template: ChatTemplate, chat: Conversation) -> tuple[Sequence[Json], str]:
    """The messages with a mark at the end of the text that is to go on, and that text. Raises InvalidRequest."""
    asked = chat.continue_final_message
    field = asked if isinstance(asked, str) else "content"
    last = dict(chat.messages[-1])
    content = last.get(field)
    names = [name for name in _REASONING if last.get(name) == content] if field in _REASONING else [field]
    if content is None:
        raise _not_open(f"the last message has no {field!r}")
    if not any(name in template.source for name in names):
        raise _not_open(f"the chat template does not read {field!r}")
    if isinstance(content, str):
        last |= dict.fromkeys(names, content + _TAG)
        return [*chat.messages[:-1], last], content
    blocks = list(content) if isinstance(content, list | tuple) else []
    for position in reversed(range(len(blocks))):
        if isinstance(blocks[position], dict) and isinstance(text := blocks[position].get("text"), str):
            blocks[position] = {**blocks[position], "text": text + _TAG}
            last[field] = blocks if isinstance(content, list) else tuple(blocks)
            return [*chat.messages[:-1], last], text
    raise _not_open("the last message has no text")


def _cut(rendered: str, ending: str) -> str:
    """Returns what stands before the mark. Raises InvalidRequest for a template that changes the text."""
    if ending.strip() not in rendered or _TAG.strip() not in rendered:
        raise _not_open("the chat template leaves the last message out, or changes it")
    at = rendered.rindex(_TAG.strip())
    return rendered[:at] if rendered.startswith(_TAG, at) else rendered[:at].rstrip()


def _not_open(reason: str) -> InvalidRequest:
    return InvalidRequest(f"continue_final_message has nothing to go on with: {reason}", "continue_final_message")


def _why_not(error: Exception, chat: Conversation) -> str:
    parts = any(isinstance(message.get("content"), list | tuple) for message in chat.messages)
    advice = "; it may read contents that are texts only, not lists of parts" if parts else ""
    return f"chat cannot be rendered by the model's chat template ({type(error).__name__}){advice}"


def _bounded(pieces: Iterator[str]) -> Iterator[str]:
    num_chars = 0
    for piece in pieces:
        num_chars += len(piece)
        if num_chars > MAX_RENDERED_CHARS:
            raise InvalidRequest(f"chat is over {MAX_RENDERED_CHARS} characters when rendered", "chat")
        yield piece
