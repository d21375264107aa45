"""The commands that start a cluster and stop it again: demo, serve."""

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TextIO

from cluster.checkpoint.shipped import DEMO
from cluster.cli.arguments import (
    Commands,
    add_cluster_arguments,
    add_command,
    add_security_arguments,
    cluster_config,
    serve_options,
)
from cluster.cli.sampling import print_stream
from cluster.errors import SetupError

if TYPE_CHECKING:
    from cluster.client.grpc_client import Client
    from cluster.console import ExpertCounts
    from cluster.runtime.start.served import ServedCluster

ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # each drains and stops the cluster
DEMO_QUESTIONS = ("What happens when a shard dies?", "How do I deploy to Kubernetes?")
COUNTERS_SETTLE_S = 1.5  # a shard counts its experts' tokens each second
COUNTERS_TIMEOUT_S = 10.0
DEMO_METRICS = (
    "moecluster_requests_total",
    "moecluster_generated_tokens_total",
    "moecluster_time_to_first_token_seconds_sum",
    "moecluster_engine_step_seconds_count",
    "moecluster_dispatch_rows_total",
    "moecluster_controller_up_shards",
    "moecluster_controller_plan_epoch",
)


def add_commands(commands: Commands) -> None:
    demo = add_command(commands, "demo", _demo, "serve the tiny model that the package has, ask it two questions")
    demo.add_argument("--keep", action="store_true", help="leave the cluster running until Ctrl-C")
    add_cluster_arguments(demo, grpc_port=0, http_port=0, metrics_port=0)

    serve = add_command(commands, "serve", _serve, "serve a checkpoint from this machine until Ctrl-C")
    serve.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        default=DEMO,
        help="directory of a checkpoint (config.json, *.safetensors), or its name on the hub: OWNER/NAME, or "
        "OWNER/NAME@REVISION for a branch, tag or commit (default: demo, the tiny one that the package has)",
    )
    add_cluster_arguments(serve)
    add_security_arguments(serve)


def _serve(args: argparse.Namespace) -> int:
    from cluster.console import print_cluster

    with _served(args, args.model) as cluster:
        print_cluster(cluster)
        _wait_for_interrupt("Ctrl-C drains and stops.")
    return 0


def _demo(args: argparse.Namespace) -> int:
    from cluster.client.direct import read_url
    from cluster.client.grpc_client import Client
    from cluster.console import print_cluster, print_metrics, print_placement

    print("serving the package's demo model: qwen2_moe, 64 routed experts in each of 3 layers, 4 for each token")
    with _served(args, DEMO) as cluster:
        status = print_cluster(cluster)
        print_placement(status)
        if not status.metrics_addresses:
            raise SetupError(
                "no node serves metrics, of which the demo draws its experts: the controller's log tells why"
            )
        metrics_url, address = status.metrics_addresses[0], f"127.0.0.1:{cluster.grpc_port}"
        with Client(address) as client:
            for question in DEMO_QUESTIONS:
                _ask(client, question, metrics_url)
        print_metrics(read_url(metrics_url, timeout_s=10.0), DEMO_METRICS)
        if args.keep:
            page = f"open {cluster.http_url}/ in a browser, or " if cluster.http_url else ""
            _wait_for_interrupt(f"running: {page}try: moe-cluster chat --address {address}\nCtrl-C stops.")
        else:
            print("\nto chat on its page, or to call it over HTTP or gRPC: moe-cluster demo --keep")
    return 0


def _ask(client: "Client", question: str, metrics_url: str) -> None:
    """Prints a question, its answer, and the experts that computed both."""
    from cluster.client.direct import read_url
    from cluster.console import expert_counts, expert_lines
    from cluster.types import ChatMessage, SamplingParams

    before = expert_counts(read_url(metrics_url, timeout_s=10.0))
    print(f"\nuser:      {question}\nassistant: ", end="", flush=True)
    print_stream(client.stream([ChatMessage(role="user", content=question)], SamplingParams()))
    print("its experts, a row a layer (busiest █):")
    for line in expert_lines(before, _settled(metrics_url, before)):
        print(line)


def _settled(metrics_url: str, before: "ExpertCounts") -> "ExpertCounts":
    """The experts' counters, once they have grown and grow no more. Blocks for COUNTERS_TIMEOUT_S at most."""
    from cluster.client.direct import read_url
    from cluster.console import Working, expert_counts

    now = time.monotonic()
    counts, changed, deadline = before, now, now + COUNTERS_TIMEOUT_S
    with Working("counting its experts' tokens …"):
        while now < deadline and (counts == before or now < changed + COUNTERS_SETTLE_S):
            time.sleep(0.2)
            new, now = expert_counts(read_url(metrics_url, timeout_s=10.0)), time.monotonic()
            if new != counts:
                counts, changed = new, now
    return counts


@contextmanager
def _served(args: argparse.Namespace, model: str) -> Iterator["ServedCluster"]:
    """Serves a cluster while it is open, and shows its start and stop. SIGTERM and a closed terminal act as Ctrl-C."""
    from cluster.console import LoadProgress, Working  # rich loads with it, torch and ray with the next: not for --help

    with Working("loading torch and Ray …"):
        from cluster.runtime.start.served import ServedCluster

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    config = cluster_config(args, model)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    with LoadProgress("starting Ray and Ray Serve") as progress:
        cluster = ServedCluster(config, serve_options(args), progress.update, _end, progress.start)
    try:
        yield cluster
    finally:
        for number in ENDS:
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not leave processes behind
        _say("stopping: waiting for running requests …", sys.stdout)
        with Working("stopping …"):
            cluster.close()
        _say("stopped", sys.stdout)


def _end(reason: str) -> None:
    """Ends this process, even while its main thread hangs: its Ray is gone, and with it all that ran on it."""
    out = sys.__stderr__  # while stopping, sys.stderr is a buffer
    if out is not None:
        show_cursor = "\x1b[?25h" if out.isatty() else ""  # the start's progress hides it
        _say(f"{show_cursor}moe-cluster: {reason}: all streams have ended and nothing runs any more; serve again", out)
    os._exit(1)


def _say(line: str, out: TextIO) -> None:
    """Prints a line; the stop goes on if nobody reads it, or not these characters."""
    with suppress(OSError, ValueError):
        print(line, file=out, flush=True)


def _wait_for_interrupt(invitation: str) -> None:
    """Prints the invitation and returns on Ctrl-C, SIGTERM or a closed terminal, however soon it comes.

    A KeyboardInterrupt could be raised in any callback and be lost there, so the signal writes to a pipe instead.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in ENDS:
        signal.signal(number, lambda *_: None)
    print(f"\n{invitation}", flush=True)
    while os.read(reader, 1)[0] not in ENDS:
        pass  # another signal, which has its own handler
    signal.set_wakeup_fd(-1)
    os.close(reader)
    os.close(writer)
    print()
