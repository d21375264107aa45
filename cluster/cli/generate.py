"""The command that sends prompts, one or many, to a running server: generate."""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.cli import sampling, terminal
from cluster.cli.arguments import Commands, add_command
from cluster.client import options
from cluster.conversation import Json
from cluster.errors import ClusterError, Overloaded, SetupError

if TYPE_CHECKING:
    from cluster.cli.prompts import Asked
    from cluster.client.grpc_client import Client

MAX_CONCURRENCY = 1024
MAX_TRIES = 8  # of a prompt that a busy server refuses; the waits between them double
MAX_WAIT_S = 30.0
FORMATS = ("lines", "jsonl", "whole")


@dataclass(frozen=True, slots=True)
class _Answered:
    """error: None for a good answer."""

    text: str = ""
    finish_reason: str = ""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_tokens: int = 0
    error: ClusterError | None = None

    def as_json(self) -> dict[str, Json]:
        if self.error is not None:
            return {"error": {"code": self.error.grpc_code, "message": str(self.error)}}
        usage = {
            "prompt_tokens": self.num_prompt_tokens,
            "cached_tokens": self.num_cached_tokens,
            "completion_tokens": self.num_tokens,
        }
        return {"text": self.text, "finish_reason": self.finish_reason, "usage": usage}


def add_commands(commands: Commands) -> None:
    generate = add_command(
        commands, "generate", _generate, "send prompts to a running server; stream one answer, or print many"
    )
    generate.add_argument(
        "prompt", nargs="*", metavar="PROMPT",
        help="a text to go on with (no chat template); without one, standard input has them",
    )  # fmt: skip
    generate.add_argument(
        "--file", action="append", type=Path, default=[], metavar="FILE",
        help="with prompts; - is standard input; may be given several times",
    )  # fmt: skip
    generate.add_argument(
        "--input-format", choices=FORMATS,
        help="of files and standard input: a prompt a line; a JSON object a line, with prompt, messages or token_ids, "
        "and parameters of its own; or each as one prompt (default: jsonl for .jsonl, else lines)",
    )  # fmt: skip
    generate.add_argument(
        "--output", choices=("text", "jsonl"), default="text",
        help="answers as text, or as a JSON object a line with the prompt and the usage (default: %(default)s)",
    )  # fmt: skip
    generate.add_argument(
        "--concurrency", type=int, default=8, metavar="N", help="prompts at a time (default: %(default)s)"
    )
    options.add_arguments(generate)
    sampling.add_arguments(generate)


def _generate(args: argparse.Namespace) -> int:
    from cluster.cli.prompts import read_prompts

    if not 1 <= args.concurrency <= MAX_CONCURRENCY:
        raise SetupError(f"--concurrency is {args.concurrency}, 1 to {MAX_CONCURRENCY} is needed")
    params = sampling.params_of(args)
    asked = read_prompts(args.prompt, args.file, args.input_format, params)
    with options.connect(args) as client:
        if len(asked) == 1 and args.output == "text":
            sampling.print_stream(client.stream(asked[0].prompt, asked[0].params))
            return 0
        return _many(client, asked, args)


def _many(client: "Client", asked: "list[Asked]", args: argparse.Namespace) -> int:
    """Prints every answer in the order of its prompt; 1 where one failed."""
    from cluster.console import CountProgress

    failed = 0
    # On a terminal the answers themselves are the progress.
    with nullcontext() if sys.stdout.isatty() else CountProgress("prompts", "prompts") as bar:
        for index, answered in enumerate(_answers(client, asked, args.concurrency)):
            if args.output == "jsonl":
                line = {"index": index, **asked[index].given, **answered.as_json()}
                print(json.dumps(line, ensure_ascii=False), flush=True)
            elif answered.error is None:
                print(answered.text, flush=True)
            if answered.error is not None:
                failed += 1
                if args.output == "text":
                    terminal.complain(f"prompt {index + 1}: {answered.error}")
            if bar is not None:
                bar.update(index + 1, len(asked))
    return 1 if failed else 0


def _answers(client: "Client", asked: "list[Asked]", concurrency: int) -> Iterator[_Answered]:
    threads = ThreadPoolExecutor(concurrency)
    try:
        running: list[Future[_Answered]] = [threads.submit(_answer, client, one) for one in asked]
        for future in running:
            yield future.result()
    except BaseException:  # Ctrl-C, or nobody reads on: the streams under way end with the connection
        client.close()
        threads.shutdown(wait=False, cancel_futures=True)
        raise
    threads.shutdown()


def _answer(client: "Client", asked: "Asked") -> _Answered:
    from cluster.pb.moecluster.v1 import inference_pb2 as pb

    wait_s = 0.5
    for left in reversed(range(MAX_TRIES)):
        try:
            pieces = list(client.stream(asked.prompt, asked.params))
        except Overloaded as error:
            if not left:
                return _Answered(error=error)
            time.sleep(max(error.retry_after_s, wait_s))
            wait_s = min(2 * wait_s, MAX_WAIT_S)
        except ClusterError as error:
            return _Answered(error=error)
        else:
            break
    last = pieces[-1]
    return _Answered(
        text="".join(piece.text for piece in pieces),
        finish_reason=pb.FinishReason.Name(last.finish_reason).removeprefix("FINISH_REASON_").lower(),
        num_prompt_tokens=last.usage.prompt_tokens,
        num_cached_tokens=last.usage.cached_tokens,
        num_tokens=last.usage.completion_tokens,
    )
