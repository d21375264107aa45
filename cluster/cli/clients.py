"""The commands that talk with a server over gRPC: generate, chat."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.cli import terminal
from cluster.cli.arguments import Commands, add_command
from cluster.client import options
from cluster.errors import InvalidRequest, SetupError, Unavailable

if TYPE_CHECKING:  # these take a while to load: not for --help
    from cluster.pb.moecluster.v1 import inference_pb2 as pb
    from cluster.types import SamplingParams


def add_commands(commands: Commands) -> None:
    generate = add_command(commands, "generate", _generate, "send a prompt to a running server, stream the answer")
    generate.add_argument("prompt", metavar="PROMPT", help="the text to go on with (no chat template)")
    _add_client_arguments(generate)

    chat = add_command(commands, "chat", _chat, "talk with a running server; an empty line or Ctrl-D ends it")
    chat.add_argument("--system", help="system message; default: the chat template's own")
    chat.add_argument(
        "--tools", type=Path, metavar="FILE",
        help="functions that the model may call: JSON, a list of schemas as in the OpenAI API; calls are shown as text",
    )  # fmt: skip
    _add_client_arguments(chat)


def _add_client_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_arguments(parser)
    parser.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="tokens of answer at most (default: the checkpoint's, else all that fit)",
    )
    parser.add_argument("--temperature", type=float, metavar="X", help="0 is greedy (default: the checkpoint's)")
    parser.add_argument("--top-p", type=float, metavar="X", help="nucleus sampling (default: the checkpoint's)")
    parser.add_argument("--top-k", type=int, metavar="N", help="0 keeps all (default: the checkpoint's)")
    parser.add_argument(
        "--seed", type=int, metavar="N", help="the same seed gives the same answer (default: another one each time)"
    )


def _generate(args: argparse.Namespace) -> int:
    params = _sampling(args)
    with options.connect(args) as client:
        print_stream(client.stream(args.prompt, params))
    return 0


def _chat(args: argparse.Namespace) -> int:
    from cluster.conversation import ChatMessage, Conversation

    params, tools = _sampling(args), None if args.tools is None else _tools(args.tools)
    history = [ChatMessage(role="system", content=args.system)] if args.system else []
    with options.connect(args) as client:
        if not client.is_serving(timeout_s=10.0):
            raise Unavailable(f"no server is ready at {args.address}: start one with `moe-cluster serve MODEL_DIR`")
        while True:
            try:
                line = terminal.utf8(input("you> " if sys.stdin.isatty() else ""), "the line").strip()
            except EOFError:
                return 0
            if not line:
                return 0
            history.append(ChatMessage(role="user", content=line))
            answer = print_stream(client.stream(Conversation(messages=history, tools=tools), params))
            history.append(ChatMessage(role="assistant", content=answer))


def _tools(path: Path) -> list[object]:
    """Raises SetupError."""
    try:
        tools = json.loads(path.read_bytes())
    except OSError as error:
        raise SetupError(f"--tools: {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise SetupError(f"--tools: {path} is no JSON: {error}") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise SetupError(f"--tools: {path} has no list of JSON objects")
    return tools


def _sampling(args: argparse.Namespace) -> "SamplingParams":
    """Raises SetupError for a value that no server takes: wrong usage, of which no server needs to hear."""
    from cluster.types import SamplingParams

    try:
        return SamplingParams(
            max_tokens=args.max_tokens, temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, seed=args.seed
        )
    except InvalidRequest as error:
        option = f"--{error.field.replace('_', '-')}"
        raise SetupError(f"{option}{str(error).removeprefix(error.field)}") from error


def print_stream(pieces: Iterator["pb.GenerateStreamResponse"]) -> str:
    """Prints an answer while it comes; returns its text."""
    texts = []
    for piece in pieces:
        texts.append(piece.text)
        print(piece.text, end="", flush=True)
    print()
    return "".join(texts)
