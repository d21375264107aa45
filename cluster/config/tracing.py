"""The arguments of a deployed cluster that are about traces. Knows no OpenTelemetry."""

from dataclasses import dataclass
from typing import Literal

from cluster.config.engine import EngineConfig
from cluster.config.options import MOST_CALLS, option
from cluster.errors import SetupError

TracingProtocol = Literal["auto", "grpc", "http/protobuf"]
TRACING_PROTOCOLS: tuple[TracingProtocol, ...] = ("auto", "grpc", "http/protobuf")


@dataclass(frozen=True, slots=True, kw_only=True)
class TracingConfig(EngineConfig):
    """Beside an engine's. `ClusterConfig` has them all and checks them."""

    tracing: bool = option(
        False,
        "sends traces over OTLP: a span of each request, of its phases and of some steps with their shards; needs the "
        "extra [tracing]; standard OTEL_* variables count where no argument says otherwise",
    )
    tracing_endpoint: str = option(
        "",
        "where the traces go, as http://collector:4317; empty: OTEL_EXPORTER_OTLP_ENDPOINT of each process, else this "
        "machine",
    )
    tracing_protocol: TracingProtocol = option(
        "auto",
        "OTLP over grpc or http/protobuf; auto: OTEL_EXPORTER_OTLP_PROTOCOL, else grpc",
        choices=TRACING_PROTOCOLS,
    )
    tracing_ratio: float | None = option(
        None,
        "share of the requests without a traceparent that are traced, those with one follow it; unset: as "
        "OTEL_TRACES_SAMPLER says, else all",
        least=0,
        most=1,
    )
    tracing_steps: int = option(
        8,
        "steps of a traced request that get spans of their own, with one for each shard: its first so many, then each "
        "power of two; 0: none",
        least=0,
        most=MOST_CALLS,
    )

    def check_tracing(self) -> None:
        """Raises SetupError for an endpoint that is no URL."""
        endpoint = self.tracing_endpoint
        if endpoint and not endpoint.startswith(("http://", "https://")):
            raise SetupError(f"tracing_endpoint is {endpoint!r}, a URL as http://collector:4317 is needed")
