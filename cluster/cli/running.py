"""The commands that look at a running cluster and change it: status, top, rebalance, roll, scale, chaos."""

import argparse
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from cluster import chaos
from cluster.cli import terminal
from cluster.cli.arguments import Commands, add_command, add_ray_address
from cluster.errors import ClusterError, SetupError
from cluster.footprint.servers import find_address
from cluster.inputs import shown
from cluster.runtime.start.ray_address import TRY_ANOTHER, find_ray

if TYPE_CHECKING:
    from cluster.runtime.operate import RunningCluster

CONNECT_TIMEOUT_S = 30.0  # of a Ray that answers: to connect, and to ask for the status, which may take 10 s itself
MAX_INTERVAL_S = 86_400.0
MAX_PROCESSES = 4096  # of one kind, that a cluster is scaled to; as over HTTP


def add_commands(commands: Commands) -> None:
    status = add_command(commands, "status", _status, "show a running cluster: processes, loads of experts, faults")
    add_ray_address(status)
    top = add_command(commands, "top", _top, "show a running cluster, live, until Ctrl-C")
    top.add_argument(
        "--interval", type=float, default=1.0, metavar="SECONDS", help="between two looks (default: %(default)s)"
    )
    add_ray_address(top)
    rebalance = add_command(commands, "rebalance", _rebalance, "move experts of a running cluster to where the load is")
    add_ray_address(rebalance)
    roll = add_command(
        commands, "roll", _roll, "give controller, responses' store and shards new processes, as for a new version"
    )
    add_ray_address(roll)
    scale = add_command(commands, "scale", _scale, "change how many processes a running cluster has, one at a time")
    scale.add_argument(
        "--expert-shards",
        type=int,
        metavar="N",
        help="processes that share the routed experts (default: as many as now)",
    )
    scale.add_argument(
        "--attention-replicas",
        type=int,
        metavar="N",
        help="processes with dense weights and KV cache (default: as many as now)",
    )
    add_ray_address(scale)
    chaos_parser = add_command(commands, "chaos", _chaos, "break a running cluster part by part under streams, compare")
    chaos.add_arguments(chaos_parser)
    add_ray_address(chaos_parser)


def _status(args: argparse.Namespace) -> int:
    from cluster.console import Working, print_status

    with _running(args) as cluster:
        with Working("asking the controller …"):
            status = cluster.status()
        print_status(status)
    return 0


def _top(args: argparse.Namespace) -> int:
    from cluster.console import watch_status

    if not 0 < args.interval <= MAX_INTERVAL_S:
        raise SetupError(f"--interval is {args.interval:g}, above 0 and at most {MAX_INTERVAL_S:g} is needed")
    with _running(args) as cluster, suppress(KeyboardInterrupt):
        watch_status(cluster.status, args.interval)
    return 0


def _rebalance(args: argparse.Namespace) -> int:
    with _running(args) as cluster, _work_shown(cluster, "rebalancing …"):
        done = cluster.rebalance()
    print(done)
    return 0


def _roll(args: argparse.Namespace) -> int:
    with _running(args) as cluster, _work_shown(cluster, "replacing processes …"):
        done = cluster.roll()
    print(done)
    return 0


def _scale(args: argparse.Namespace) -> int:
    if args.expert_shards is None and args.attention_replicas is None:
        raise SetupError("nothing to change: give --expert-shards, --attention-replicas or both")
    for option, count in (("expert-shards", args.expert_shards), ("attention-replicas", args.attention_replicas)):
        if count is not None and not 1 <= count <= MAX_PROCESSES:  # before the other of the two is changed
            raise SetupError(f"--{option} is {shown(count)}, 1 to {MAX_PROCESSES} is needed")
    with _running(args) as cluster:
        if args.expert_shards is not None:
            with _work_shown(cluster, "scaling expert shards …"):
                done = cluster.scale_experts(args.expert_shards)
            print(done)
        if args.attention_replicas is not None:
            print(cluster.scale_attention(args.attention_replicas))
            running = _await_replicas(cluster, args.attention_replicas)
            print(f"{running} attention replicas run", file=sys.stderr)
    return 0


def _await_replicas(cluster: "RunningCluster", wanted: int) -> int:
    """Returns when as many attention replicas run as are wanted; shows how many do."""
    from cluster.console import Working

    shown = None
    with Working("scaling attention replicas …") as working:
        while (running := cluster.attention_replicas()) != wanted:
            if running != shown:
                working.say(f"{running} of {wanted} run")
                shown = running
            time.sleep(0.5)  # Serve starts and drains them in its own time
    return running


def _chaos(args: argparse.Namespace) -> int:
    from cluster.bench.limits import check_output

    chaos.check(args)
    if args.json is not None:
        check_output("--json", args.json)
    with _running(args) as cluster:
        return chaos.run(args, cluster)


def _running(args: argparse.Namespace) -> "RunningCluster":
    """Returns the running cluster that the arguments name."""
    from cluster.console import Working

    address = find_address(args.ray_address if args.ray_address != "auto" else None)
    with Working("looking for a Ray …"):
        found = find_ray(address)
    late = f"the Ray at {found} takes no connection in {CONNECT_TIMEOUT_S:g} s: {TRY_ANOTHER}"
    with Working(f"connecting to the Ray at {found} …"):
        from cluster.runtime.operate import RunningCluster  # ray loads with it and reads the environment

        with terminal.bounded(CONNECT_TIMEOUT_S, late):
            return RunningCluster(found)


@contextmanager
def _work_shown(cluster: "RunningCluster", words: str) -> Iterator[None]:
    """Shows the controller's word on a change while it goes on; until there is one, `words`."""
    from cluster.console import Working

    done = threading.Event()

    def show() -> None:
        last = ""
        while not done.wait(0.5):
            try:
                work = cluster.status().work
            except ClusterError:
                continue
            if work and work != last:
                working.say(work)
            last = work

    thread = threading.Thread(target=show, daemon=True)
    with Working(words) as working:
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
