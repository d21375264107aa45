"""A conversation as a chat template takes it: plain JSON values, checked. Knows no template and no tokenizer.

Here happens all that transformers' `apply_chat_template` does to its arguments before it renders, so that a
conversation can travel to the process that renders it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import chain
from typing import Any

from cluster import inputs
from cluster.errors import InvalidRequest

Json = Any  # a text, a number, true, false, null, or a list or an object of these
MAX_DEPTH = 64  # of lists and objects in one another; deeper ones exhaust Python's stack
CHARS_A_VALUE = 16  # a template takes as long for a value as for so many characters
RESERVED = ("messages", "tools", "documents", "add_generation_prompt")  # a template's own variables
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of the same, in transformers' order


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A function that the assistant called. arguments: by name."""

    name: str
    arguments: Mapping[str, Json] = field(default_factory=dict)
    id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    """One turn. tool_calls: of an assistant's turn.  tool_call_id, name: of the call that a tool's turn answers."""

    role: str
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""

    def as_json(self) -> dict[str, Json]:
        """Returns it in the form of the OpenAI API, which chat templates are written for.

        Empty fields are left out: the content, too, but only beside calls, where that API has null.
        """
        calls = [
            {
                **({"id": call.id} if call.id else {}),
                "type": "function",
                "function": {"name": call.name, "arguments": dict(call.arguments)},
            }
            for call in self.tool_calls
        ]
        optional = {"tool_calls": calls, "tool_call_id": self.tool_call_id, "name": self.name}
        return {
            "role": self.role,
            **({"content": self.content} if self.content or not calls else {}),
            **{key: value for key, value in optional.items() if value},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Turns, oldest first, and all else that a chat template may read.

    messages: at least one; ChatMessages, or objects with a "role" in the form of the OpenAI API.
    tools, documents: JSON objects; None is not the same to a template as none.
    add_generation_prompt: ends where the assistant's answer begins.  continue_final_message: ends inside the last
    turn, in its content, or in the field that is named.
    chat_template: a template, or the name of one of the checkpoint's.  template_kwargs: further variables.
    Everything is plain JSON afterwards, in copies. Raises InvalidRequest (field "chat").
    """

    messages: Sequence[Any]
    tools: Sequence[Any] | None = None
    documents: Sequence[Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool | str = False
    chat_template: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        plain: dict[str, Any] = {
            "messages": [_message(m, f"message {i}") for i, m in enumerate(_listed(self.messages, "messages"))],
            "tools": _objects(self.tools, "tools"),
            "documents": _objects(self.documents, "documents"),
            "template_kwargs": _template_kwargs(self.template_kwargs),
            "add_generation_prompt": inputs.truth_value(self.add_generation_prompt, "add_generation_prompt"),
        }
        if not isinstance(self.continue_final_message, str):
            plain["continue_final_message"] = inputs.truth_value(self.continue_final_message, "continue_final_message")
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        if not self.messages:
            raise InvalidRequest("chat has 0 messages, at least 1 is needed", "chat")
        if self.chat_template is not None:
            inputs.text(self.chat_template, "chat_template")
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message goes on with the last message, add_generation_prompt begins another one: "
                "ask for one of them",
                "continue_final_message",
            )

    def is_long(self, num_chars: int) -> bool:
        """Returns whether it has so many characters to a template, about: those of its texts, and some for each value.
        Looks at no more of it than that."""
        parts = [self.messages, self.tools, self.documents, self.template_kwargs, self.chat_template]
        return _is_long(parts, num_chars)


def plain_json(value: Any, where: str, depth: int = 0) -> Json:
    """Returns a copy of plain lists, objects, texts and numbers; tuples stay tuples, and NumPy's numbers, dataclasses
    and pydantic's models become what they hold. Raises InvalidRequest for anything else.

    Source: transformers.utils.chat_template_utils._plain_template_data, which puts "<type>" for anything else.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if depth > MAX_DEPTH:
        raise InvalidRequest(f"{where} has more than {MAX_DEPTH} lists and objects in one another", "chat")
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {plain_json(key, where, depth + 1): plain_json(one, where, depth + 1) for key, one in value.items()}
    if isinstance(value, list | tuple):
        plain = [plain_json(one, where, depth + 1) for one in value]
        return plain if isinstance(value, list) else tuple(plain)
    return plain_json(_held(value, where), where, depth + 1)


def _held(value: Any, where: str) -> Any:
    """Takes the plain value out of a NumPy number, the fields out of a dataclass or a pydantic model."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in fields(value)}
    if callable(getattr(value, "model_dump", None)):
        return value.model_dump()
    if hasattr(value, "dtype") and getattr(value, "ndim", None) == 0:
        return value.item()
    raise InvalidRequest(
        f"{where} has a {type(value).__name__}, a chat template takes texts, numbers, lists and objects", "chat"
    )


def _message(given: Any, where: str) -> dict[str, Json]:
    """A turn without nulls, its reasoning under every name that templates know. Source: transformers."""
    message = plain_json(given.as_json() if isinstance(given, ChatMessage) else given, where)
    if not isinstance(message, dict):
        raise InvalidRequest(f"{where} is {inputs.shown(given)}, an object with a role and a content is needed", "chat")
    message = {key: value for key, value in message.items() if value is not None}
    if not isinstance(message.get("role"), str):
        raise InvalidRequest(f"{where} has the role {inputs.shown(message.get('role'))}, a text is needed", "chat")
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _objects(given: Any, name: str) -> list[dict[str, Json]] | None:
    if given is None:
        return None
    plain = [plain_json(one, f"{name}[{i}]") for i, one in enumerate(_listed(given, name))]
    for i, one in enumerate(plain):
        if not isinstance(one, dict):
            raise InvalidRequest(f"{name}[{i}] is {inputs.shown(one)}, a JSON object is needed", "chat")
    return plain


def _template_kwargs(given: Any) -> dict[str, Json]:
    plain = plain_json({} if given is None else given, "template_kwargs")
    if not isinstance(plain, dict) or not all(isinstance(key, str) for key in plain):
        raise InvalidRequest(f"template_kwargs is {inputs.shown(given)}, an object is needed", "chat")
    for name in RESERVED:
        if name in plain:
            raise InvalidRequest(f"template_kwargs has {name!r}, which has a field of its own", "chat")
    return plain


def _listed(given: Any, name: str) -> Iterable[Any]:
    if not inputs.is_series(given):
        raise InvalidRequest(f"{name} is {inputs.shown(given)}, a list is needed", "chat")
    return list(given)


def _is_long(value: Json, num_chars: int) -> bool:
    """Counts without recursion."""
    waiting: list[Iterator[Json]] = [iter((value,))]
    total = 0
    while waiting and total < num_chars:
        for one in waiting[-1]:
            total += CHARS_A_VALUE + (len(one) if isinstance(one, str) else 0)
            if isinstance(one, Mapping):
                waiting.append(chain(one, one.values()))
                break
            if isinstance(one, list | tuple):
                waiting.append(iter(one))
                break
            if total >= num_chars:
                break
        else:
            waiting.pop()
    return total >= num_chars
