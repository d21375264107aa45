"""The /commands of a chat. Each changes the session, and says whether the model is asked now."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from cluster.cli.chat.session import Session, tools_in
from cluster.errors import InvalidRequest

TEMPLATES_OWN = "the chat template's own"
CHECKPOINTS = "the checkpoint's"


class Next(Enum):
    """The step after a command: the next turn is read, the model answers, or the chat ends."""

    READ = "read"
    ANSWER = "answer"
    END = "end"


@dataclass(frozen=True, slots=True)
class Command:
    """run: gets the session, the text behind the name, and where to print a line."""

    argument: str
    meaning: str
    run: Callable[[Session, str, Callable[[str], None]], Next]


def run(line: str, session: Session, say: Callable[[str], None]) -> Next:
    """Carries out a line that begins with a slash. Raises ClusterError, OSError."""
    name, _, rest = line[1:].partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        raise InvalidRequest(f"/{name} is no command, /help lists them; //{name} … sends it to the model")
    return command.run(session, rest.strip(), say)


def _help(session: Session, rest: str, say: Callable[[str], None]) -> Next:
    shown = {f"/{name} {command.argument}": command.meaning for name, command in COMMANDS.items()}
    width = max(map(len, shown))
    for name, meaning in shown.items():
        say(f"{name:{width}}  {meaning}")
    say("Alt-Enter, or a backslash at the end of a line, begins another line; so do lines between two of three quotes.")
    say("Ctrl-C ends an answer, Ctrl-D the chat. A line that begins with // goes to the model with one slash.")
    return Next.READ


def _system(session: Session, rest: str, say: Callable[[str], None]) -> Next:
    if rest:
        session.system = "" if rest == "off" else rest
    say(f"system message: {session.system or TEMPLATES_OWN}")
    return Next.READ


def _reset(session: Session, rest: str, say: Callable[[str], None]) -> Next:
    session.turns.clear()
    say("the conversation begins anew; system message, tools and parameters stay")
    return Next.READ


def _retry(session: Session, rest: str, say: Callable[[str], None]) -> Next:
    if session.take_back_answer():
        return Next.ANSWER
    say("nothing was asked yet")
    return Next.READ


def _undo(session: Session, rest: str, say: Callable[[str], None]) -> Next:
    say("the last question is taken back" if session.take_back_question() else "nothing was asked yet")
    return Next.READ


def _save(session: Session, rest: str, say: Callable[[str], None]) -> Next:
    path = _path(rest, "save")
    session.save(path)
    say(f"saved {len(session.turns)} turns to {path}")
    return Next.READ


def _load(session: Session, rest: str, say: Callable[[str], None]) -> Next:
    path = _path(rest, "load")
    session.load(path)
    say(f"loaded {len(session.turns)} turns from {path}")
    return Next.READ


def _params(session: Session, rest: str, say: Callable[[str], None]) -> Next:
    name, _, value = rest.replace("=", " ", 1).partition(" ")
    if name and not value.strip():
        raise InvalidRequest(f"/params {name} needs a value, or default")
    if name:
        session.set_param(name, value.strip())
    given = session.given_params()
    shown = "  ".join(f"{name}={json.dumps(value)}" for name, value in given.items())
    say(f"parameters: {shown or CHECKPOINTS}")
    return Next.READ


def _tools(session: Session, rest: str, say: Callable[[str], None]) -> Next:
    if rest:
        session.tools = None if rest == "off" else tools_in(_path(rest, "tools"))
    names = [str(tool.get("function", tool).get("name", "?")) for tool in session.tools or ()]
    say(f"tools: {', '.join(names) or 'none'}")
    return Next.READ


def _result(session: Session, rest: str, say: Callable[[str], None]) -> Next:
    if not session.open_calls():
        raise InvalidRequest("no call of the last answer waits for a result")
    session.result(rest)
    return Next.READ if session.open_calls() else Next.ANSWER


def _show(session: Session, rest: str, say: Callable[[str], None]) -> Next:
    if session.system:
        say(f"system: {session.system}")
    for turn in session.turns:
        calls = [call.get("function", call) for call in turn.get("tool_calls") or ()]
        called = "".join(f" [{call['name']} {json.dumps(call['arguments'])}]" for call in calls)
        say(f"{turn['role']}: {turn.get('content', '')}{called}")
    return Next.READ


def _path(text: str, name: str) -> Path:
    if text in ("", "-"):  # standard input has the chat's own lines
        raise InvalidRequest(f"/{name} needs a file's name")
    return Path(text).expanduser()


COMMANDS = {
    "help": Command("", "shows this", _help),
    "system": Command("[TEXT | off]", "shows or sets the system message; off: the chat template's own", _system),
    "retry": Command("", "asks the last question again", _retry),
    "undo": Command("", "takes the last question and its answer back", _undo),
    "reset": Command("", "forgets the conversation", _reset),
    "show": Command("", "shows the conversation", _show),
    "params": Command("[NAME VALUE]", "shows or sets temperature, max_tokens …; default: the checkpoint's", _params),
    "tools": Command("[FILE | off]", "shows or reads the functions that the model may call", _tools),
    "result": Command("TEXT", "answers the model's call of a tool", _result),
    "save": Command("FILE", "writes the conversation to a file", _save),
    "load": Command("FILE", "goes on with one that was saved", _load),
    "exit": Command("", "leaves, as Ctrl-D does", lambda session, rest, say: Next.END),
}
