"""The part of a configuration that says whether, where to and how much is traced. Loads no OpenTelemetry."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Self

from cluster.config import ClusterConfig
from cluster.errors import SetupError

EXTRA = "tracing"
GRPC, HTTP = "grpc", "http/protobuf"
_EXPORTERS = {GRPC: "opentelemetry.exporter.otlp.proto.grpc", HTTP: "opentelemetry.exporter.otlp.proto.http"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TracingSettings:
    """endpoint: "" takes OTEL_EXPORTER_OTLP_ENDPOINT.  protocol: of OTLP, "auto" takes OTEL_EXPORTER_OTLP_PROTOCOL.
    ratio: of traces that begin here, None takes OTEL_TRACES_SAMPLER.  num_steps: as `tracing_steps` of the cluster.
    """

    endpoint: str = ""
    protocol: str = "auto"
    ratio: float | None = None
    num_steps: int = 8

    @classmethod
    def of(cls, config: ClusterConfig) -> Self | None:
        """None where nothing is traced. Raises SetupError where traces are asked for and cannot be sent."""
        if not config.tracing:
            return None
        check_installed(config)
        return cls(
            endpoint=config.tracing_endpoint,
            protocol=config.tracing_protocol,
            ratio=config.tracing_ratio,
            num_steps=config.tracing_steps,
        )


def missing_packages() -> list[str]:
    """The exporters that are not installed."""
    return [name for name in _EXPORTERS.values() if not _is_there(name)]


def check_installed(config: ClusterConfig) -> None:
    """Raises SetupError where traces are asked for and cannot be sent."""
    if config.tracing and missing_packages():
        raise SetupError(
            "tracing is true, and OpenTelemetry's exporters are not installed here: pip install "
            f"'moe-cluster[{EXTRA}]' on every node"
        )


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it is missing
        return False
