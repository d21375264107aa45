"""Draws a cluster: its addresses, processes, placement, loads and faults."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Protocol

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster.config.kv_cache import AUTO
from cluster.console.base import OutputConsole, ranges
from cluster.console.experts import bar
from cluster.errors import ClusterError
from cluster.experts.placement import PlacementPlan
from cluster.status import ClusterStatus, LeavingNode, ProcessInfo
from cluster.types import EngineStats
from cluster.working import Working

FIGURES_TIMEOUT_S = 20.0  # the controller asks engines every 2 s, and makes each node's metrics server after its start
FIGURES_POLL_S = 0.2


class Served(Protocol):
    """The part of a served cluster that is shown."""

    grpc_address: str
    http_url: str

    def status(self) -> ClusterStatus: ...


def print_cluster(cluster: Served, sleep: Callable[[float], None] = time.sleep) -> ClusterStatus:
    """Prints the cluster's addresses and the size of its caches, and returns its status with these.

    Blocks until the controller knows them, for FIGURES_TIMEOUT_S at most.
    """
    print(f"gRPC     {cluster.grpc_address}   moecluster.v1.InferenceService, grpc.health.v1.Health, reflection")
    if cluster.http_url:
        print(f"HTTP     {cluster.http_url}/v1   OpenAI's API")
        print(f"page     {cluster.http_url}/     a chat, and the cluster live")
    with Working("waiting for the first figures …"):
        status = _with_figures(cluster.status, sleep)
    for address in status.metrics_addresses or ("none yet: the controller's log tells why",):
        print(f"metrics  {address}")
    if status.dense:
        print("experts  none: the model is dense, attention replicas alone serve it")
    if cache := describe_cache(status):
        print(f"cache    {cache}")
    return status


def _with_figures(read: Callable[[], ClusterStatus], sleep: Callable[[float], None]) -> ClusterStatus:
    """The first status that has both the metrics' addresses and the caches' sizes, or the last one in time."""
    for _ in range(round(FIGURES_TIMEOUT_S / FIGURES_POLL_S)):
        status = read()
        if status.metrics_addresses and describe_cache(status):
            return status
        sleep(FIGURES_POLL_S)
    return read()


def describe_cache(status: ClusterStatus) -> str:
    """Describes the smallest KV cache of the attention replicas, and its meaning for answers; "" while unknown."""
    known = [replica.stats for replica in status.replicas if replica.stats is not None and replica.stats.block_size]
    if not known:
        return ""
    smallest = min(known, key=lambda stats: stats.num_blocks)
    tokens = smallest.num_blocks * smallest.block_size
    form = "" if smallest.kv_cache_dtype == AUTO else f" in {smallest.kv_cache_dtype}"
    text = f"{tokens:,} tokens of keys and values{form} in each attention replica"
    if (smallest.cache_tokens or tokens) < smallest.max_model_len:
        text += (
            f"; the context has {smallest.max_model_len:,}: without max_tokens an answer ends where the cache is full"
        )
    return text


def print_status(status: ClusterStatus) -> None:
    """Prints a running cluster, once."""
    OutputConsole().print(render_status(status))


def watch_status(read: Callable[[], ClusterStatus], interval_s: float) -> None:
    """Shows a running cluster, live, until Ctrl-C. A read that fails shows its error and is made again."""
    console = OutputConsole()
    with Live(console=console, screen=True, auto_refresh=False) if console.is_terminal else nullcontext() as live:
        last: ClusterStatus | None = None
        while True:
            shown: RenderableType
            try:
                status = read()
            except ClusterError as error:
                shown = Text(f"{error}")
            else:
                shown, last = render_status(status, last), status
            if live is None:  # a file or a pipe gets one after the other
                console.print(shown)
                console.file.flush()
            else:
                live.update(shown, refresh=True)
            time.sleep(interval_s)


def render_status(status: ClusterStatus, before: ClusterStatus | None = None) -> RenderableType:
    """Draws processes, loads of experts and faults. before: an earlier status, for rates."""
    state = "SERVING" if status.covered else f"some experts have had no copy for {status.uncovered_s:.0f} s"
    state = status.failure or ("draining" if status.draining else state if status.published else "starting")
    placement = "dense model" if status.dense else f"plan epoch {status.epoch}   imbalance {status.imbalance:.2f}"
    title = f"{state}   {placement}"
    parts: list[RenderableType] = [Text(title, style="bold")]
    if len(status.versions) > 1:
        advice = "a rollout is under way, or `moe-cluster roll` is still to come"
        parts.append(Text(f"versions {', '.join(status.versions)}: {advice}", style="yellow"))
    if status.work:
        parts.append(Text(f"under way: {status.work}", style="yellow"))
    parts += [Text(_describe_leaving(status, node), style="yellow") for node in status.leaving_nodes]
    if status.adapters:
        parts.append(Text(f"adapters {', '.join(status.adapters)}"))
    parts.append(_replica_table(status, before))
    if not status.dense:
        parts.append(_shard_table(status))
    if status.load is not None and status.plan is not None and any(map(sum, status.load)):
        parts.append(_load_map(status.load, status.plan))
    if status.faults:
        lines = (f"{time.strftime('%H:%M:%S', time.localtime(fault.at))}  {fault.what}" for fault in status.faults[-8:])
        parts.append(Text("recent faults\n" + "\n".join(lines)))
    return Group(*parts)


def _describe_leaving(status: ClusterStatus, node: LeavingNode) -> str:
    """Says what still stands on a node that Ray drains, and why."""
    left = "" if math.isinf(node.until) else f", which ends in {max(0.0, node.until - time.time()):.0f} s"
    standing = [f"shard {s.shard_id}" for s in status.shards if s.node_id == node.node_id]
    standing += [f"attention replica {r.name}" for r in status.replicas if r.process.node_id == node.node_id]
    waits = f"; {node.waits}" if node.waits else ""
    return f"Ray drains node {node.node_id[:8]}{left}; on it: {', '.join(standing) or 'no shard and no replica'}{waits}"


def _replica_table(status: ClusterStatus, before: ClusterStatus | None) -> Table:
    drafting = any(r.stats is not None and r.stats.drafted_tokens for r in status.replicas)
    columns = ("attention replica", "slot", "pid", "running", "waiting", "KV cache", "tokens/s", "plan")
    table = Table(*columns, *(["drafted tokens"] if drafting else []))
    earlier = {} if before is None else {r.name: r.stats for r in before.replicas}
    for replica in status.replicas:
        stats, last = replica.stats, earlier.get(replica.name)
        slot = "" if replica.process.slot < 0 else str(replica.process.slot)
        pids = ", ".join(map(str, (replica.process.pid, *replica.process.rank_pids)))
        if stats is None:
            table.add_row(replica.name, slot, pids, "", "", "", "", str(replica.epoch))
            continue
        rate = ""
        if last is not None and stats.at > last.at:
            rate = f"{(stats.generated_tokens - last.generated_tokens) / (stats.at - last.at):.1f}"
        use = f"{stats.used_blocks / max(1, stats.num_blocks):.0%}"
        if stats.kv_cache_dtype != AUTO:
            use += f" ({stats.kv_cache_dtype})"
        table.add_row(
            replica.name,
            slot,
            pids,
            f"{stats.running} ({stats.held} held)" if stats.held else str(stats.running),
            str(stats.waiting),
            use,
            rate,
            str(replica.epoch),
            *([_drafts(stats)] if drafting else []),
        )
    return table


def _drafts(stats: EngineStats) -> str:
    """The share of the drafted tokens that were right, of how many."""
    drafted = stats.drafted_tokens
    return f"{stats.accepted_tokens / drafted:.0%} right of {drafted:,}" if drafted else ""


def _shard_table(status: ClusterStatus) -> Table:
    wanted = f" of {status.target_shards}" if status.target_shards != len(status.shards) else ""
    table = Table(
        f"expert shard ({len(status.shards)}{wanted})", "state", "pid", "experts", "share of load", "respawns"
    )
    shares = status.shares
    for shard in status.shards:
        experts = _slice(status.plan, shard.shard_id)
        table.add_row(
            str(shard.shard_id), shard.state, _pid(shard.process), str(sum(map(len, experts.values()))),
            f"{shares[shard.shard_id]:.0%}" if shares else "", str(shard.respawns),
        )  # fmt: skip
    return table


def _slice(plan: PlacementPlan | None, shard_id: int) -> Mapping[int, tuple[int, ...]]:
    """Empty for a shard that the plan does not have yet."""
    return plan.slices[shard_id] if plan is not None and shard_id < plan.num_shards else {}


def _pid(process: ProcessInfo | None) -> str:
    return "" if process is None else str(process.pid)


def _load_map(load: list[list[float]], plan: PlacementPlan) -> Text:
    """Draws a row for each layer, a character for each expert, as high as its load; it underlines those with copies."""
    text = Text("load of each expert, a row a layer (highest █; underlined: has copies)\n")
    for rates, layer_id in zip(load, plan.layer_ids, strict=True):
        text.append(f"{layer_id:3d} ")
        for rate, owners in zip(rates, plan.owners(layer_id), strict=True):
            text.append(bar(rate / (max(rates) or 1.0)), style="underline" if len(owners) > 1 else "")
        text.append("\n")
    return text


def print_placement(status: ClusterStatus) -> None:
    """Prints the experts of each running shard."""
    table = Table("shard", "pid", "state", "experts of each layer", title=f"experts, plan epoch {status.epoch}")
    for shard in status.shards:
        experts = ranges(next(iter(_slice(status.plan, shard.shard_id).values()), ()))
        table.add_row(str(shard.shard_id), _pid(shard.process), shard.state, experts)
    OutputConsole().print(table)
