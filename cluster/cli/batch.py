"""The command that answers a file of requests: batch."""

import argparse
import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.cli import terminal
from cluster.cli.arguments import Commands, add_command, add_options, byte_size
from cluster.client import options
from cluster.errors import SetupError

if TYPE_CHECKING:
    from cluster.batch.ledger import Ledger
    from cluster.batch.run import Answerer

DEFAULT_ADDRESS = "127.0.0.1:8000"
MAX_CONCURRENCY = 4096
OFFLINE_OPTIONS = ("dtype", "device", "kv_cache_bytes", "rope_scaling")


def add_commands(commands: Commands) -> None:
    batch = add_command(
        commands, "batch", _batch, "answer a file of requests in OpenAI's batch format; a killed one goes on"
    )
    batch.add_argument(
        "input", type=Path, metavar="FILE",
        help="JSON lines: custom_id, method (POST), url (/v1/chat/completions, /v1/completions, /v1/embeddings), body",
    )  # fmt: skip
    batch.add_argument(
        "output", type=Path, metavar="OUT",
        help="JSON lines: id, custom_id, response, error, as they come; lines that are there already are kept",
    )  # fmt: skip
    batch.add_argument(
        "--address", metavar="HOST:PORT", help=f"HTTP of a server, or its URL (default: {DEFAULT_ADDRESS})"
    )
    batch.add_argument(
        "--model", metavar="MODEL", help="a directory, or a name on the hub, to be computed here instead"
    )
    batch.add_argument(
        "--concurrency", type=int, default=64, metavar="N", help="requests at a time (default: %(default)s)"
    )
    batch.add_argument(
        "--patience-s", type=float, default=120.0, metavar="SECONDS",
        help="wait for a server that is busy or gone (default: %(default)s)",
    )  # fmt: skip
    batch.add_argument("--dtype", help="offline: float32, bfloat16, float16 or auto (default: the checkpoint's)")
    batch.add_argument("--device", help="offline: cpu, cuda or auto (default: auto)")
    batch.add_argument(
        "--kv-cache-bytes", type=byte_size, metavar="BYTES", help="offline (default: a share of the memory)"
    )
    add_options(batch, "rope_scaling")
    options.add_security_arguments(batch)


def _batch(args: argparse.Namespace) -> int:
    """Returns 1 where a line has no good answer."""
    from cluster.batch import lines
    from cluster.batch.ledger import Ledger
    from cluster.console import CountProgress

    _check(args)
    total = lines.count(args.input)
    with Ledger(args.output) as ledger:
        before = len(ledger.done)
        try:
            with CountProgress("requests", "requests") as bar:
                asyncio.run(_run(args, ledger, lambda through: bar.update(through, total)))
        except KeyboardInterrupt:
            terminal.complain(f"{len(ledger.done):,} of {total:,} lines are answered: the same command goes on there")
            raise
        new, failed = len(ledger.done) - before, ledger.num_failed
        print(f"{args.output}: {total:,} requests, {new:,} of them answered now, {failed:,} without a good answer")
    return 1 if failed else 0


async def _run(args: argparse.Namespace, ledger: "Ledger", progress: Callable[[int], None]) -> None:
    from cluster.batch.lines import read
    from cluster.batch.run import Pace, run

    if all(line.id in ledger.done for line in read(args.input)):
        return  # no model needs to be loaded
    pace = Pace(concurrency=args.concurrency, patience_s=args.patience_s)
    async with _answerer(args) as answerer:
        await run(read(args.input), answerer, ledger, pace, progress)


@asynccontextmanager
async def _answerer(args: argparse.Namespace) -> AsyncIterator["Answerer"]:
    if args.model is None:
        from cluster.batch.http import make_http_answerer

        async with make_http_answerer(args, args.address or DEFAULT_ADDRESS) as answerer:
            yield answerer
        return
    from cluster.batch.app import answerer_of
    from cluster.llm import LLM

    given = {name: value for name in OFFLINE_OPTIONS if (value := getattr(args, name)) is not None}
    with LLM(args.model, max_num_seqs=args.concurrency, **given) as llm:
        async with answerer_of(llm) as app:
            yield app


def _check(args: argparse.Namespace) -> None:
    """Raises SetupError."""
    if args.address is not None and args.model is not None:
        raise SetupError("give --address of a running server or --model to compute here: one of the two")
    given = [name for name in OFFLINE_OPTIONS if getattr(args, name) is not None]
    if given and args.model is None:
        raise SetupError(f"--{given[0].replace('_', '-')} is of an offline model: a server has its own; give --model")
    if not 1 <= args.concurrency <= MAX_CONCURRENCY:
        raise SetupError(f"--concurrency is {args.concurrency}, 1 to {MAX_CONCURRENCY} is needed")
    if not 0 <= args.patience_s < float("inf"):
        raise SetupError(f"--patience-s is {args.patience_s:g}, 0 or more is needed")
    if args.output.exists() and args.input.exists() and args.output.samefile(args.input):
        raise SetupError(f"{args.output} is both input and output: choose another file for the answers")
