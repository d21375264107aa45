"""A conversation and the way it is answered. Knows no terminal and no server."""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from cluster.client.files import read_whole
from cluster.conversation import ChatMessage, Conversation, Json, ToolCall
from cluster.errors import ClusterError, InvalidRequest, SetupError
from cluster.types import SamplingParams

Turn = dict[str, Json]  # in the form of the OpenAI API
PARAMS = tuple(f.name for f in fields(SamplingParams) if f.name != "logprobs")  # those that change what is shown
MAX_FILE_BYTES = 64 << 20


@dataclass(slots=True)
class Session:
    """system: "" leaves it to the chat template.  turns: without the system message, oldest first."""

    params: SamplingParams
    system: str = ""
    tools: Sequence[Mapping[str, Json]] | None = None
    turns: list[Turn] = field(default_factory=list)

    def conversation(self) -> Conversation:
        """Raises InvalidRequest."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return Conversation(messages=[*system, *self.turns], tools=self.tools)

    def ask(self, text: str) -> None:
        """Adds a question, in place of one that has no answer."""
        if self.turns and self.turns[-1]["role"] == "user":
            self.turns.pop()
        self.turns.append(ChatMessage(role="user", content=text).as_json())

    def answer(self, text: str, calls: Sequence[ToolCall] = ()) -> None:
        self.turns.append(ChatMessage(role="assistant", content=text, tool_calls=tuple(calls)).as_json())

    def result(self, text: str) -> None:
        """Adds what a tool gave, for the oldest call of the last answer that has no result."""
        call = self.open_calls()[0]
        name = call.get("function", call).get("name", "")
        turn = ChatMessage(role="tool", content=text, tool_call_id=call.get("id", ""), name=name)
        self.turns.append(turn.as_json())

    def open_calls(self) -> list[Json]:
        """The calls of the last answer that wait for a result."""
        for num_results, turn in enumerate(reversed(self.turns)):
            if turn["role"] != "tool":
                return list(turn.get("tool_calls") or ())[num_results:]
        return []

    def take_back_answer(self) -> bool:
        """Removes everything after the last question; false where there is none."""
        for last in range(len(self.turns) - 1, -1, -1):
            if self.turns[last]["role"] == "user":
                del self.turns[last + 1 :]
                return True
        return False

    def take_back_question(self) -> bool:
        """Removes the last question and everything after it; false where there is none."""
        if not self.take_back_answer():
            return False
        self.turns.pop()
        return True

    def set_param(self, name: str, value: str) -> None:
        """value: "default" for the checkpoint's. Raises InvalidRequest."""
        if name not in PARAMS:
            raise InvalidRequest(f"{name!r} is no parameter, one of {', '.join(PARAMS)} is needed", "params")
        defaults: dict[str, Json] = {f.name: f.default for f in fields(SamplingParams)}
        self.params = replace(self.params, **{name: defaults[name] if value == "default" else _value(value)})

    def given_params(self) -> dict[str, Json]:
        """The parameters that are not left to the checkpoint."""
        values: dict[str, Json] = {f.name: getattr(self.params, f.name) for f in fields(self.params)}
        form = values["structured_outputs"]
        if form is not None:
            values["structured_outputs"] = {name: value for name, value in asdict(form).items() if value is not None}
        defaults = {f.name: f.default for f in fields(self.params)}
        return {name: values[name] for name in PARAMS if values[name] != defaults[name]}

    def save(self, path: Path) -> None:
        """Writes a file that only this user can read, whole or not at all. Raises SetupError, OSError."""
        if path.exists() and not _is_saved_chat(path):
            raise SetupError(f"{path} is there and no saved chat: choose another name")
        content = {"system": self.system, "messages": self.turns, "tools": self.tools, "params": self.given_params()}
        descriptor, written = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump(content, file, ensure_ascii=False, indent=1)
                file.write("\n")
            Path(written).replace(path)
        except BaseException:
            with suppress(OSError):
                os.unlink(written)
            raise

    def load(self, path: Path) -> None:
        """Takes a saved chat, or a list of messages in the form of the OpenAI API. Raises ClusterError."""
        content = _read(path)
        if isinstance(content, list):
            content = {"messages": content}
        if not isinstance(content, dict) or not isinstance(content.get("messages"), list):
            raise SetupError(f"{path} has no list of messages")
        tools, params = content.get("tools"), content.get("params") or {}
        if tools is not None and not _are_tools(tools):
            raise SetupError(f"{path} has no list of tools, as JSON objects")
        if not isinstance(params, dict):
            raise SetupError(f"{path} has no object of parameters")
        system, turns = str(content.get("system") or ""), content["messages"]
        if turns and isinstance(turns[0], dict) and turns[0].get("role") == "system":
            system, turns = str(turns[0].get("content", "")), turns[1:]
        loaded = Session(replace(self.params), system, tools, turns)
        if turns:
            try:
                checked = loaded.conversation().messages
            except ClusterError as error:
                raise SetupError(f"{path}: {error}") from error
            loaded.turns = list(checked[1:] if system else checked)
        try:
            for name, value in params.items():
                loaded.set_param(name, json.dumps(value))
        except InvalidRequest as error:
            raise SetupError(f"{path}: {error}") from error
        self.params, self.system, self.tools, self.turns = loaded.params, loaded.system, loaded.tools, loaded.turns


def tools_in(path: Path) -> list[Mapping[str, Json]]:
    """The functions that a file describes: a list of schemas as in the OpenAI API. Raises SetupError."""
    try:
        tools = json.loads(read_whole(path))
    except SetupError as error:
        raise SetupError(f"--tools: {error}") from error
    except (ValueError, RecursionError) as error:
        raise SetupError(f"--tools: {path} is no JSON: {error}") from error
    if not _are_tools(tools):
        raise SetupError(f"--tools: {path} has no list of JSON objects")
    return list(tools)


def _are_tools(value: Json) -> bool:
    return isinstance(value, list) and all(isinstance(tool, dict) for tool in value)


def _value(text: str) -> Json:
    """A number, a list, true or false; any other text is itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _read(path: Path) -> Json:
    """Raises SetupError for a file that cannot be read, or is no JSON."""
    raw = read_whole(path, MAX_FILE_BYTES)
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise SetupError(f"{path} is no JSON: {error}") from error


def _is_saved_chat(path: Path) -> bool:
    try:
        content = _read(path)
    except ClusterError:
        return False
    return isinstance(content, dict) and isinstance(content.get("messages"), list)
