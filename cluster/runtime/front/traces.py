"""Traces of an ingress's requests, and of an attention replica's. OpenTelemetry loads where traces are asked for."""

from typing import TYPE_CHECKING

from cluster.checkpoint.model_files import served_name
from cluster.config import ClusterConfig
from cluster.tracing.settings import TracingSettings

if TYPE_CHECKING:
    from cluster.tracing.replica import ReplicaTracing
    from cluster.tracing.requests import RequestTracing


def request_spans(config: ClusterConfig) -> "RequestTracing | None":
    """For an ingress; None where nothing is traced."""
    settings = TracingSettings.of(config)
    if settings is None:
        return None
    from cluster.tracing.requests import RequestTracing
    from cluster.tracing.spans import open_spans

    return RequestTracing(open_spans(settings, "ingress"), config.model_id or served_name(config.model))


def replica_spans(config: ClusterConfig, name: str) -> "ReplicaTracing | None":
    """For an attention replica; None where nothing is traced."""
    settings = TracingSettings.of(config)
    if settings is None:
        return None
    from cluster.tracing.replica import ReplicaTracing
    from cluster.tracing.spans import open_spans

    return ReplicaTracing(open_spans(settings, "attention-replica", replica=name))
