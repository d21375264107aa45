"""Maps rows over actors with Ray Data. Does not know what the rows are."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray

from cluster.errors import ClusterError, SetupError
from cluster.runtime.start.local_ray import start_ray

Row = Mapping[str, Any]


def map_rows(
    rows: Sequence[Row],
    worker: type,
    arguments: tuple[Any, ...],
    *,
    num_workers: int,
    cpus: float,
    gpus: float,
    batch_size: int,
    address: str | None,
) -> Iterator[Row]:
    """Yields the rows that the workers make, as they come.

    worker: a class that Ray pickles; `worker(*arguments)` takes and returns columns, of up to `batch_size` rows.
    address: of a running Ray; None starts one of this machine.
    Raises SetupError without Ray Data's packages, and the worker's ClusterError.
    """
    try:
        import pyarrow
        from ray import data
    except ImportError as error:
        raise SetupError(f"Ray Data lacks a package ({error}): pip install 'moe-cluster[data]'") from error
    connected = start_ray(num_cpus=num_workers * cpus + 1, address=address)
    try:
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        data.DataContext.get_current().enable_progress_bars = False
        blocks = max(1, min(len(rows), max(num_workers * 4, -(-len(rows) // batch_size))))
        mapped = (
            data.from_arrow(pyarrow.Table.from_pylist(list(rows)))
            .repartition(blocks)
            .map_batches(
                worker,
                fn_constructor_args=arguments,
                batch_size=batch_size,
                compute=data.ActorPoolStrategy(size=num_workers),
                num_cpus=cpus,
                num_gpus=gpus,
            )
        )
        yield from mapped.iter_rows()
    except ray.exceptions.RayError as error:
        raise _ours(error) from error
    finally:
        connected.stop()


def _ours(error: BaseException) -> ClusterError:
    """The worker's own error, which Ray wraps several times; else the last of its lines."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, ClusterError):
            return found
        found = found.__cause__ or getattr(found, "cause", None)
    lines = str(error).strip().splitlines()
    return ClusterError(f"a worker of Ray Data failed: {lines[-1] if lines else type(error).__name__}")
