"""Loads an engine in its process and starts its loop. Torch loads with this module."""

import logging
from typing import Any

import ray

from cluster.checkpoint.draft import draft_bytes
from cluster.checkpoint.names import dense_bytes, dense_shapes
from cluster.checkpoint.opening import open_checkpoint
from cluster.config import ClusterConfig
from cluster.config.tensor_parallel import share_of
from cluster.engine.adapters import AdapterSetup
from cluster.engine.load import load_engine
from cluster.engine.loop import EngineLoop
from cluster.engine.step_record import open_step_record
from cluster.experts.dispatch import ExpertDispatcher
from cluster.metrics import DispatchMetrics, EngineMetrics, new_registry, report_version
from cluster.runtime.process import num_sharers, process_info
from cluster.runtime.workers.computing import prepare_to_compute
from cluster.runtime.workers.directory import ShardDirectory, adapter_list, take_slot
from cluster.runtime.workers.progress import ProgressReport
from cluster.runtime.workers.rank_actor import ActorRanks
from cluster.runtime.workers.traces import open_engine_traces
from cluster.runtime.workers.transports import lanes_of, make_transport

log = logging.getLogger(__name__)


def start_engine(
    config: ClusterConfig, replica: str, controller: Any, num_threads: int, record_path: str
) -> EngineLoop:
    """As `EngineActor.__init__`. Blocks until it is loaded and the shards have their experts."""
    sharers = num_sharers(config, ray.nodes())
    ranks = ActorRanks(config, num_threads, sharers) if config.tensor_parallel_size > 1 else None
    prepare_to_compute(num_threads)
    registry = report_version(new_registry(), "engine")
    me = ray.get_runtime_context().current_actor
    info = process_info(ranks.pids() if ranks else ())
    process = take_slot(controller, replica, info, me)
    place = str(process.slot) if process.slot >= 0 else replica  # in the metrics
    traces = open_engine_traces(config, registry, replica, place)
    metrics = traces.metrics if traces is not None else DispatchMetrics(registry, place)
    directory = ShardDirectory(controller, replica, process, me, metrics.plan_epoch)
    transport = make_transport(config, directory, metrics)
    experts = ExpertDispatcher(
        transport,
        directory,
        metrics,
        shard_timeout_s=config.shard_timeout_s,
        recovery_timeout_s=config.recovery_timeout_s,
        lanes=lanes_of(transport),
    )
    total = _bytes_to_load(config)
    engine = load_engine(
        config.model,
        config.engine(),
        experts,
        EngineMetrics(registry, place),
        ProgressReport(controller, replica, total),
        remote_experts=True,
        on_step=open_step_record(record_path).write if record_path else lambda _: None,
        wait_for_experts=directory.wait_ready,
        num_sharers=sharers,
        adapters=AdapterSetup(adapter_list(controller, config)),
        others=ranks,
    )
    engine.adapters.begin(adapter_list(controller, config))  # one may have come meanwhile
    loop = EngineLoop(engine, None if traces is None else traces.follow(engine, experts))
    loop.start()
    log.info("engine %s is loaded, %d KV cache blocks", replica, engine.blocks.num_blocks)
    return loop


def _bytes_to_load(config: ClusterConfig) -> int:
    """That this process downloads and reads."""
    reader = open_checkpoint(config.model)
    reader.check_names()
    part = share_of(reader.config, 0, config.tensor_parallel_size).config
    missing = reader.missing_bytes(dense_shapes(reader.config))
    return missing + dense_bytes(part, reader.config.dtype) + draft_bytes(config.engine())
