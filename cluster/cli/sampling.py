"""The options that choose tokens, of the commands that talk with a server, and the one stream that they print."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.client.files import read_whole
from cluster.errors import InvalidRequest, SetupError

if TYPE_CHECKING:  # these take a while to load: not for --help
    from cluster.pb.moecluster.v1 import inference_pb2 as pb
    from cluster.structured import StructuredOutputsParams
    from cluster.types import SamplingParams

NUMBERS: tuple[tuple[str, type, str, str], ...] = (  # fields of SamplingParams: name, type, metavar, meaning
    ("max_tokens", int, "N", "tokens of answer at most (default: the checkpoint's, else all that fit)"),
    ("temperature", float, "X", "0 is greedy (default: the checkpoint's)"),
    ("top_p", float, "X", "nucleus sampling (default: the checkpoint's)"),
    ("top_k", int, "N", "0 keeps all (default: the checkpoint's)"),
    ("min_p", float, "X", "drops tokens below this share of the likeliest one (default: the checkpoint's)"),
    ("repetition_penalty", float, "X", "over prompt and answer; 1 is none (default: the checkpoint's)"),
    ("presence_penalty", float, "X", "once for each token of the answer; 0 is none (default: the checkpoint's)"),
    ("frequency_penalty", float, "X", "for each time a token comes; 0 is none (default: the checkpoint's)"),
    ("seed", int, "N", "the same seed gives the same answer (default: another one each time)"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name, kind, metavar, meaning in NUMBERS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=meaning)
    parser.add_argument(
        "--stop", action="append", metavar="TEXT", help="ends the answer and is cut from it; may be given several times"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json-schema", type=Path, metavar="FILE", help="the answer is JSON by this schema")
    form.add_argument("--json-object", action="store_true", help="the answer is a JSON object")
    form.add_argument("--regex", metavar="PATTERN", help="the answer is a text that the whole pattern matches")
    form.add_argument(
        "--choice", action="append", metavar="TEXT", help="the answer is this text; give the option for each of several"
    )
    form.add_argument(
        "--grammar", type=Path, metavar="FILE", help="the answer is a text of this grammar, Lark's or llama.cpp's"
    )


def params_of(args: argparse.Namespace) -> "SamplingParams":
    """Raises SetupError for a value that no server takes: wrong usage, of which no server needs to hear."""
    from cluster.types import SamplingParams

    given = {name: getattr(args, name) for name, *_ in NUMBERS}
    form = _form_of(args)
    try:
        return SamplingParams(**given, stop=args.stop or (), structured_outputs=form)
    except InvalidRequest as error:
        option = f"--{error.field.replace('_', '-')}"
        raise SetupError(f"{option}{str(error).removeprefix(error.field)}") from error


def _form_of(args: argparse.Namespace) -> "StructuredOutputsParams | None":
    """The form that the options ask for, None for any. Raises SetupError."""
    from cluster.structured import StructuredOutputsParams

    given = {
        "--json-schema": ("json", None if args.json_schema is None else _content(args.json_schema, "--json-schema")),
        "--json-object": ("json_object", args.json_object or None),
        "--regex": ("regex", args.regex),
        "--choice": ("choice", args.choice),
        "--grammar": ("grammar", None if args.grammar is None else _content(args.grammar, "--grammar")),
    }
    for option, (field, value) in given.items():
        if value is not None:
            try:
                form = StructuredOutputsParams(**{field: value})
            except InvalidRequest as error:
                raise SetupError(f"{option}: {error}") from error
            return form
    return None


def _content(path: Path, option: str) -> str:
    try:
        return read_whole(path).decode("utf-8")
    except SetupError as error:
        raise SetupError(f"{option}: {error}") from error
    except UnicodeError as error:
        raise SetupError(f"{option}: {path} cannot be read: it is no text in UTF-8") from error


def print_stream(pieces: Iterator["pb.GenerateStreamResponse"]) -> None:
    """Prints an answer while it comes."""
    from cluster.console import awaited

    for piece in awaited(pieces, "waiting for the first token …"):
        print(piece.text, end="", flush=True)
    print()
