"""The command that answers a file of requests: batch."""

import argparse
import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.checkpoint.model_files import located
from cluster.cli import terminal
from cluster.cli.arguments import Commands, add_command, add_options, add_ray_address, byte_size
from cluster.client import options
from cluster.config.resources import available_cpus
from cluster.errors import SetupError

if TYPE_CHECKING:
    from cluster.batch.ledger import Ledger
    from cluster.batch.run import Answerer

DEFAULT_ADDRESS = "127.0.0.1:8000"
MAX_CONCURRENCY = 4096
MAX_WORKERS = 4096
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
    batch.add_argument(
        "--ray-data", action="store_true",
        help="spread the lines over --workers with Ray Data, each with its own model or connections, on several nodes "
        "too; needs moe-cluster[data]",
    )  # fmt: skip
    batch.add_argument("--workers", type=int, default=1, metavar="N", help="of Ray Data (default: %(default)s)")
    batch.add_argument(
        "--gpus-per-worker", type=float, default=0.0, metavar="X", help="of Ray Data's workers (default: %(default)s)"
    )
    add_ray_address(batch, "else a Ray of this machine is started for --ray-data")
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
    if args.model is not None:
        args.model = located(args.model)  # a worker runs in another folder
    total = lines.count(args.input)
    with Ledger(args.output) as ledger:
        before = len(ledger.done)
        try:
            with CountProgress("requests", "requests") as bar:
                _answer(args, ledger, lambda through: bar.update(through, total))
        except KeyboardInterrupt:
            terminal.complain(f"{len(ledger.done):,} of {total:,} lines are answered: the same command goes on there")
            raise
        new, failed = len(ledger.done) - before, ledger.num_failed
        print(f"{args.output}: {total:,} requests, {new:,} of them answered now, {failed:,} without a good answer")
    return 1 if failed else 0


def _answer(args: argparse.Namespace, ledger: "Ledger", progress: Callable[[int], None]) -> None:
    from cluster.batch.lines import read
    from cluster.batch.run import Pace, run

    if all(line.id in ledger.done for line in read(args.input)):
        return  # no model needs to be loaded
    pace = Pace(concurrency=args.concurrency, patience_s=args.patience_s)
    if args.ray_data:
        from cluster.batch.spread import Workers, run_spread

        cpus = 1.0 if args.ray_address else float(max(1, available_cpus() // args.workers))
        workers = Workers(num=args.workers, cpus=cpus, gpus=args.gpus_per_worker, ray_address=args.ray_address)
        run_spread(
            args.input,
            read(args.input),
            partial(_answerer, args),
            ledger,
            pace=pace,
            workers=workers,
            progress=progress,
        )
        return

    async def here() -> None:
        async with _answerer(args) as answerer:
            await run(read(args.input), answerer, ledger, pace, progress)

    asyncio.run(here())


@asynccontextmanager
async def _answerer(args: argparse.Namespace) -> AsyncIterator["Answerer"]:
    if args.model is None:
        from cluster.batch.http import make_http_answerer

        async with make_http_answerer(args, DEFAULT_ADDRESS if args.address is None else args.address) as answerer:
            yield answerer
        return
    from cluster.batch.app import answerer_of
    from cluster.llm import LLM

    given = {name: value for name in OFFLINE_OPTIONS if (value := getattr(args, name)) is not None}
    llm = LLM(args.model, max_num_seqs=args.concurrency, **given)
    with llm:
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
    if not 1 <= args.workers <= MAX_WORKERS or not args.gpus_per_worker >= 0:
        raise SetupError(f"--workers is {args.workers}, 1 to {MAX_WORKERS} is needed, and --gpus-per-worker 0 or more")
    if args.output.exists() and args.input.exists() and args.output.samefile(args.input):
        raise SetupError(f"{args.output} is both input and output: choose another file for the answers")
