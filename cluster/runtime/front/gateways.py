"""The parts of the cluster that gateways ask an ingress for, made of its configuration and the controller's status."""

from collections.abc import Callable, Sequence
from pathlib import Path

from cluster.checkpoint.info import published_config
from cluster.checkpoint.save_tokenizer import tokenizer_texts
from cluster.config import ClusterConfig
from cluster.serving.grpc.gateways import GatewayView, PublishedConfig
from cluster.serving.health import HealthState
from cluster.status import ClusterStatus
from cluster.types import EngineStats, SamplingParams


def gateway_view(
    config: ClusterConfig,
    model_dir: Path,
    defaults: SamplingParams,
    health: HealthState,
    status: Callable[[], ClusterStatus | None],
) -> GatewayView:
    """status: as the ingress last read it, None before the first time. Raises CheckpointError."""

    def engines() -> Sequence[EngineStats]:
        found = status()
        return () if found is None else [r.stats for r in found.replicas if r.stats is not None]

    def draining() -> bool:
        found = status()
        return found is not None and found.draining

    async def abort(client: str, names: Sequence[str]) -> None:
        """Tells all engines, since nobody else knows which one has a request. One of an older version is not asked."""
        for replica in () if (found := status()) is None else found.replicas:
            if replica.engine is not None and replica.process.takes_aborts:
                replica.engine.abort.remote(client, names)

    return GatewayView(
        health=health,
        aliases=config.aliases,
        published=PublishedConfig(**published_config(model_dir)),
        defaults=defaults,
        engines=engines,
        max_num_seqs=config.max_num_seqs,
        draining=draining,
        tokenizer_files=lambda: {} if config.skip_tokenizer else tokenizer_texts(model_dir),
        abort=abort,
    )
