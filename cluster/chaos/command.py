"""The arguments and the report of `moe-cluster chaos`."""

import argparse
import json
import random
import ssl
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress

from cluster.chaos.outcome import Outcome, outcome_of, print_outcome
from cluster.chaos.traffic import Asker, Question, Reply, ask_all, make_questions
from cluster.client import options
from cluster.client.grpc_client import Client
from cluster.client.http_streams import HttpStreams
from cluster.client.urls import server_url
from cluster.drawing import moves
from cluster.errors import ClusterError, SetupError, Unavailable
from cluster.inputs import shown

if TYPE_CHECKING:
    from cluster.runtime.operate import RunningCluster

_READY_S = 30.0
_DISTINCT = 30  # questions; each is asked several times, so that the quiet run before is short

# requests: every answer is kept, to be compared.  concurrency: a thread each.  faults: one takes a second and more.
BOUNDS = {"requests": (1, 1_000_000), "concurrency": (1, 1024), "faults": (0, 100_000)}
MAX_RECOVERY_S = 86_400.0

OF_RANKS = "kill-rank"
OF_FRONTS = {"kill-haproxy": "haproxy", "kill-ingress": "ingress"}  # kinds and roles
QUICK_KINDS = (
    "kill-shard", "kill-replica", "kill-controller", "kill-haproxy", "stop-shard", "cut-streams", "damage-frame",
)  # fmt: skip
KINDS = (
    *QUICK_KINDS, OF_RANKS, "kill-ingress", "end-shard", "end-replica", "stop-replica", "slow-shard", "refuse-memory",
    "move-experts", "rebalance", "scale-experts",
)  # fmt: skip
KINDS_OF_DENSE = (
    "kill-replica", OF_RANKS, "kill-controller", *OF_FRONTS, "end-replica", "stop-replica",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_arguments(parser)
    parser.add_argument("--http", default="", metavar="URL", help="ask there, over HTTP (default: ask over gRPC)")
    parser.add_argument(
        "--requests", type=int, default=300, metavar="N", help="streams at least (default: %(default)s)"
    )
    parser.add_argument(
        "--faults", type=int, default=60, metavar="N", help="faults in all, one at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--concurrency", type=int, default=6, metavar="N", help="streams at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--kinds",
        default=",".join(KINDS),
        metavar="NAMES",
        help=f"of faults, in turn (default: all: {', '.join(KINDS)})",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of questions and faults (default: 0)")
    parser.add_argument(
        "--recovery-timeout", type=float, default=120.0, metavar="SECONDS", help="for one fault (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")


def check(args: argparse.Namespace) -> None:
    """Raises SetupError for arguments that cannot be, before anything is connected."""
    if unknown := set(args.kinds.split(",")) - set(KINDS):
        raise SetupError(f"--kinds has {sorted(unknown)[0]!r}, known are {', '.join(KINDS)}")
    if args.http:
        server_url(args.http, "--http")
    options.check_address(args.address)
    for name, (least, most) in BOUNDS.items():
        if not least <= (given := getattr(args, name)) <= most:
            raise SetupError(f"--{name} is {shown(given)}, {least} to {most} is needed")
    if not 0 < args.recovery_timeout <= MAX_RECOVERY_S:
        raise SetupError(
            f"--recovery-timeout is {args.recovery_timeout:g}, above 0 and at most {MAX_RECOVERY_S:g} is needed"
        )


def run(args: argparse.Namespace, cluster: "RunningCluster") -> int:
    """Exit code 1 when a request failed or an answer was different. Raises ClusterError."""
    asked = tuple(args.kinds.split(","))
    kinds = possible_kinds(asked, cluster)
    if left_out := [kind for kind in asked if kind not in (*kinds, OF_RANKS, *OF_FRONTS)]:
        print(f"the model is dense, it has no shards: left out {', '.join(left_out)}", file=sys.stderr)
    if OF_RANKS in asked and OF_RANKS not in kinds:
        print(f"attention replicas are one process each: left out {OF_RANKS}", file=sys.stderr)
    for kind in (kind for kind in asked if kind in OF_FRONTS and kind not in kinds):
        print(f"no {OF_FRONTS[kind]} of ours stands in front: left out {kind}", file=sys.stderr)
    with options.connect(args) as client:
        if not client.is_serving(_READY_S):
            raise Unavailable(f"no server is ready at {args.address}: start one with `moe-cluster serve MODEL_DIR`")
        outcome = unleash(
            cluster, client, requests=args.requests, faults=args.faults, kinds=kinds, concurrency=args.concurrency,
            seed=args.seed, recovery_timeout_s=args.recovery_timeout, console=Console(stderr=True),
            asker=_http_asker(args) if args.http else client,
        )  # fmt: skip
        dtype = client.model_info().dtype
    print_outcome(outcome, dtype)
    if args.json:
        args.json.write_text(json.dumps(asdict(outcome), indent=2) + "\n")
    return 0 if outcome.lossless else 1


def _http_asker(args: argparse.Namespace) -> HttpStreams:
    """Raises SetupError."""
    tls = ssl.create_default_context(cafile=args.tls_ca)
    key = options.api_key(args.api_key_file)
    return HttpStreams(args.http, key=key, tls=tls, adapter=args.adapter, goes_on=True)


def possible_kinds(kinds: tuple[str, ...], cluster: "RunningCluster") -> tuple[str, ...]:
    """The kinds of faults that a cluster can meet: fewer without shards or ranks. SetupError if none is left."""
    status = cluster.status()
    if not any(replica.process.rank_pids for replica in status.replicas):
        kinds = tuple(kind for kind in kinds if kind != OF_RANKS)
    if not kinds:
        raise SetupError(f"attention replicas are one process each: there is no rank for {OF_RANKS}")
    if set(kinds) & set(OF_FRONTS):
        roles = {part.role for part in cluster.fronts()}
        kinds = tuple(kind for kind in kinds if OF_FRONTS.get(kind) in (None, *roles))
    if not kinds:
        raise SetupError("Serve's own proxy stands in front: there is no HAProxy for kill-haproxy")
    if not status.dense:
        return kinds
    possible = tuple(kind for kind in kinds if kind in KINDS_OF_DENSE)
    if not possible:
        raise SetupError(f"the model is dense and has no shards: give --kinds of {', '.join(KINDS_OF_DENSE)}")
    return possible


def unleash(
    cluster: "RunningCluster",
    client: Client,
    *,
    requests: int,
    faults: int,
    kinds: Sequence[str],
    concurrency: int,
    seed: int = 0,
    recovery_timeout_s: float = 120.0,
    console: Console | None = None,
    asker: Asker | None = None,
) -> Outcome:
    """First all questions in peace, then again under faults, until both numbers are reached.

    asker: asks them; None: the client.
    Raises ClusterError when the cluster does not recover.
    """
    from cluster.chaos.faults import Recovery, inject, wait_whole

    questions = make_questions(min(_DISTINCT, requests), client.model_info().vocab_size, seed)
    asker = asker or client
    num_replicas = sum(replica.engine is not None for replica in cluster.status().replicas)
    wait_whole(cluster, num_replicas, recovery_timeout_s)
    rng = random.Random(seed)
    recoveries: list[Recovery] = []
    console = console or Console(quiet=True)
    with Progress(console=console, disable=not moves(console)) as progress:
        quiet_task = progress.add_task("without faults", total=len(questions))
        quiet = ask_all(asker, questions, concurrency, lambda _: progress.update(quiet_task, advance=1))
        if wrong := [reply.error for reply in quiet if reply.error]:
            raise ClusterError(f"requests fail without any fault: {wrong[0]}")
        request_task = progress.add_task("under faults", total=requests)
        fault_task = progress.add_task("faults", total=faults)
        traffic = _Traffic(asker, questions, concurrency, lambda: progress.update(request_task, advance=1))
        started = time.monotonic()
        traffic.start()
        try:
            for number in range(faults):
                kind = kinds[number % len(kinds)]
                fault = inject(kind, cluster, rng, num_replicas, recovery_timeout_s)
                recoveries.append(fault)
                progress.update(fault_task, advance=1)
                progress.console.print(f"{fault.recovered_s:6.1f} s  {kind}: {fault.what}", highlight=False)
            traffic.wait_for(requests)
        finally:
            asked = traffic.stop()
    return outcome_of(quiet, asked, recoveries, started)


class _Traffic:
    """Asks the questions again and again until it is stopped."""

    def __init__(
        self, client: Asker, questions: Sequence[Question], concurrency: int, on_reply: Callable[[], None]
    ) -> None:
        self._client, self._questions, self._on_reply = client, questions, on_reply
        self._lock = threading.Lock()
        self._news = threading.Condition(self._lock)
        self._next = 0
        self._asked: list[tuple[int, Reply]] = []
        self._stopped = False
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(concurrency)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def wait_for(self, requests: int) -> None:
        with self._news:
            self._news.wait_for(lambda: len(self._asked) >= requests)

    def stop(self) -> list[tuple[int, Reply]]:
        """Lets the running ones end. Returns (number of the question, reply)."""
        self._stopped = True
        for thread in self._threads:
            thread.join()
        return self._asked

    def _run(self) -> None:
        while not self._stopped:
            with self._lock:
                index = self._next % len(self._questions)
                self._next += 1
            [reply] = ask_all(self._client, [self._questions[index]], 1)
            with self._news:
                self._asked.append((index, reply))
                self._news.notify_all()
            self._on_reply()
