"""What the command line draws: a start's progress, placements, metrics. Knows no Ray and no requests."""

from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from cluster.experts.placement import PlacementPlan


class Served(Protocol):
    """The part of a served cluster that is shown."""

    grpc_port: int

    def status(self) -> Any: ...


class LoadProgress:
    """A line for the start and one for each process that loads weights, while the block is open."""

    def __init__(self, title: str) -> None:
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn(),
            console=Console(stderr=True),
        )  # fmt: skip
        self._title = title
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        self._progress.console.print(self._title)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._progress.stop()

    def update(self, status: Any) -> None:
        """Takes a `ClusterStatus` in; may be called from another thread."""
        for shard in status.shards:
            self._show(
                f"expert shard {shard.shard_id}: {shard.state}",
                f"shard-{shard.shard_id}",
                shard.loaded_bytes,
                shard.total_bytes,
            )
        for replica in status.replicas:
            state = "up" if replica.loaded_bytes == replica.total_bytes else "loading"
            self._show(f"attention replica: {state}", replica.name, replica.loaded_bytes, replica.total_bytes)

    def _show(self, description: str, key: str, loaded: int, total: int) -> None:
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task(description, total=None)
        self._progress.update(self._tasks[key], description=description, completed=loaded, total=total or None)


def print_cluster(cluster: Served) -> None:
    """Where the cluster is reached."""
    status = cluster.status()
    print(f"gRPC     127.0.0.1:{cluster.grpc_port}   moecluster.v1.InferenceService, grpc.health.v1.Health, reflection")
    for address in status.metrics_addresses:
        print(f"metrics  {address}")


def print_placement(status: Any) -> None:
    """Which experts each running shard holds."""
    table = Table("shard", "pid", "state", "experts of each layer", title=f"experts, plan epoch {status.epoch}")
    for shard in status.shards:
        experts = ranges(next(iter(status.plan.slices[shard.shard_id].values())))
        table.add_row(str(shard.shard_id), str(shard.process.pid), shard.state, experts)
    Console().print(table)


def print_plan(plan: PlacementPlan, dtype: str, expert_bytes: int, dense_bytes: int, kv_bytes_per_token: int) -> None:
    """Which expert would go where, and the bytes of each process."""
    console = Console()
    table = Table(
        "process",
        "experts of each sparse layer",
        "experts",
        "weights",
        title=f"{len(plan.layer_ids)} sparse layers, {dtype}",
    )
    table.add_row("attention replica", "dense weights", "", size(dense_bytes))
    for shard_id, layers in enumerate(plan.slices):
        count = sum(len(ids) for ids in layers.values())
        shown = ranges(next(iter(layers.values()), ()))
        table.add_row(f"expert shard {shard_id}", shown, str(count), size(count * expert_bytes))
    console.print(table)
    console.print(
        f"KV cache: {size(kv_bytes_per_token)} a token, for each attention replica beside its weights", highlight=False
    )


def print_metrics(text: str, names: tuple[str, ...]) -> None:
    """An excerpt of a Prometheus exposition."""
    print("\nmetrics (excerpt):")
    for line in text.splitlines():
        if line.startswith(names):
            print(f"  {line}")


def ranges(ids: tuple[int, ...]) -> str:
    """Sorted ids in short: 0-8, 12."""
    parts: list[list[int]] = []
    for i in sorted(ids):
        if parts and parts[-1][1] == i - 1:
            parts[-1][1] = i
        else:
            parts.append([i, i])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def size(num_bytes: float) -> str:
    """1536 -> 1.5 KB; powers of 1000, as disks and GPUs are sold."""
    unit = 0
    while num_bytes >= 1000 and unit < 4:
        num_bytes, unit = num_bytes / 1000, unit + 1
    return f"{num_bytes:.4g} {('B', 'KB', 'MB', 'GB', 'TB')[unit]}"
