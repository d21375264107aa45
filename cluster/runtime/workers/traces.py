"""Traces of an engine's requests. OpenTelemetry loads where traces are asked for."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.config import ClusterConfig
from cluster.engine.engine import Engine
from cluster.experts.dispatch import ExpertDispatcher
from cluster.metrics import CollectorRegistry
from cluster.tracing.dispatch import TracedDispatchMetrics
from cluster.tracing.settings import TracingSettings

if TYPE_CHECKING:
    from cluster.tracing.engine import EngineTracing
    from cluster.tracing.spans import Spans


@dataclass(frozen=True, slots=True)
class EngineTraces:
    """metrics: with which the engine's dispatcher must be made."""

    spans: "Spans"
    metrics: TracedDispatchMetrics
    num_steps: int

    def follow(self, engine: Engine, experts: ExpertDispatcher) -> "EngineTracing":
        """Traces the engine's steps from now on; its loop must report its requests."""
        from cluster.engine.traced import TracedRunner
        from cluster.tracing.engine import EngineTracing

        tracing = EngineTracing(self.spans, self.metrics, experts.transport.trace, self.num_steps)
        engine.runner = TracedRunner(engine.runner, tracing, lambda: range(experts.plans.current().num_shards))
        return tracing


def open_engine_traces(
    config: ClusterConfig, registry: CollectorRegistry, replica: str, place: str
) -> EngineTraces | None:
    """None where nothing is traced. place: of the engine, in its metrics."""
    settings = TracingSettings.of(config)
    if settings is None:
        return None
    from cluster.tracing.spans import open_spans

    spans = open_spans(settings, "engine", replica=replica)
    return EngineTraces(spans, TracedDispatchMetrics(registry, place), settings.num_steps)
