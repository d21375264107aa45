"""The command: its options, and the loop of questions and answers."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.cli import sampling, terminal
from cluster.cli.arguments import Commands, add_command
from cluster.client import options
from cluster.errors import ClusterError, SetupError, Unavailable

if TYPE_CHECKING:
    from cluster.cli.chat.lines import Lines
    from cluster.cli.chat.session import Session
    from cluster.client.grpc_client import Client
    from cluster.conversation import ToolCall

READY_TIMEOUT_S = 10.0


def add_commands(commands: Commands) -> None:
    chat = add_command(
        commands, "chat", _chat, "talk with a running server; /help lists what else it does, Ctrl-D ends it"
    )
    chat.add_argument("--system", default="", help="system message; default: the chat template's own")
    chat.add_argument(
        "--tools", type=Path, metavar="FILE",
        help="functions that the model may call: JSON, a list of schemas as in the OpenAI API",
    )  # fmt: skip
    chat.add_argument("--load", type=Path, metavar="FILE", help="goes on with a chat that /save wrote")
    chat.add_argument(
        "--no-history", action="store_true", help="keep no file with the lines that were typed, for the arrow keys"
    )
    options.add_arguments(chat)
    sampling.add_arguments(chat)


def _chat(args: argparse.Namespace) -> int:
    from cluster.cli.chat.lines import history_file, is_terminal, open_lines
    from cluster.cli.chat.session import Session, tools_in
    from cluster.cli.chat.slash import COMMANDS

    params = sampling.params_of(args)
    session = Session(params, args.system, None if args.tools is None else tools_in(args.tools))
    if args.load is not None:
        try:
            session.load(args.load)
        except ClusterError as error:
            raise SetupError(f"--load: {error}") from error
    with options.connect(args) as client:
        if not client.is_serving(READY_TIMEOUT_S):
            raise Unavailable(f"no server is ready at {args.address}: start one with `moe-cluster serve MODEL_DIR`")
        history = None if args.no_history else history_file()
        words = {f"/{name}": command.meaning for name, command in COMMANDS.items()}
        Chat(session, client, open_lines(words, history), person=is_terminal()).run()
    return 0


class Chat:
    """person: reads and types. Without one the first error ends the chat, and so does Ctrl-C."""

    def __init__(self, session: "Session", client: "Client", lines: "Lines", *, person: bool) -> None:
        from cluster.console.base import OutputConsole

        self._session, self._client, self._lines, self._person = session, client, lines, person
        self._console = OutputConsole(highlight=False)
        self._context = 0

    def run(self) -> None:
        """Returns when the user leaves. Raises ClusterError, OSError, KeyboardInterrupt without a person."""
        if self._person:
            info = self._client.model_info()
            self._context = info.max_model_len
            self._note(f"{info.model_id}, {info.max_model_len:,} tokens of context; /help lists commands")
        while True:
            try:
                if not self._turn():
                    return
            except EOFError:
                if self._person:
                    print()
                return
            except KeyboardInterrupt:
                if not self._person:
                    raise
                self._note("Ctrl-D or /exit leaves")
            except (ClusterError, OSError) as error:
                if not self._person or isinstance(error, BrokenPipeError):
                    raise
                terminal.complain(error if isinstance(error, ClusterError) else f"{error.filename}: {error.strerror}")

    def _turn(self) -> bool:
        """Reads a turn and answers it; false when the user leaves."""
        from cluster.cli.chat import slash

        line = self._lines.read()
        if not line:
            return True
        if line.startswith("/") and not line.startswith("//"):
            after = slash.run(line, self._session, self._note)
            if after is slash.Next.ANSWER:
                self._answer()
            return after is not slash.Next.END
        self._session.ask(line.removeprefix("/") if line.startswith("//") else line)
        self._answer()
        return True

    def _answer(self) -> None:
        """Answers the last turn; a question without an answer stays, so that /retry may ask it again."""
        from cluster.cli.chat.answer import TextAlone, account, show
        from cluster.serving.tools.whole import WholeCalls

        asked = self._session.conversation()
        reader = WholeCalls() if self._session.tools else TextAlone()
        shown = show(self._client.stream(asked, self._session.params), reader, self._draw_call)
        if shown.text or shown.calls:
            self._session.answer(shown.text, shown.calls)
        if not self._person:
            if shown.stopped:
                raise KeyboardInterrupt
            return
        self._note(account(shown, self._context))
        if shown.calls:
            self._note("/result TEXT answers the call")

    def _draw_call(self, call: "ToolCall") -> None:
        from rich.text import Text

        from cluster.cli.chat.answer import call_line

        self._console.print(Text(f"→ {call_line(call)}", style="cyan"), soft_wrap=True)

    def _note(self, line: str) -> None:
        """A line that is no part of the conversation: on stderr, where stdout has answers alone."""
        from rich.text import Text

        if self._person:
            self._console.print(Text(line, style="dim"), soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)
