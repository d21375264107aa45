"""A plain gRPC client of the service: what the command line talks with. Knows no Ray."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.errors import ClusterError, InvalidRequest, Overloaded, SetupError, Unauthenticated, Unavailable
from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.pb.moecluster.v1 import inference_pb2_grpc
from cluster.serving.direct import grpc_options
from cluster.serving.messages import from_sampling_params
from cluster.types import ChatMessage, SamplingParams

_ERRORS: dict[grpc.StatusCode, type[ClusterError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """PEM files. ca: who signed the server's certificate; None is whom this machine trusts.  cert, key: this client's
    own, for a server that asks for one; both or neither."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises SetupError."""
        if (self.cert is None) != (self.key is None):
            raise SetupError("a client's certificate and its key belong together: give both --tls-cert and --tls-key")
        try:
            ca, key, cert = (None if path is None else path.read_bytes() for path in (self.ca, self.key, self.cert))
        except OSError as error:
            raise SetupError(f"{error.filename} cannot be read: {error.strerror}") from error
        return grpc.ssl_channel_credentials(ca, key, cert)


class Client:
    """One connection. Blocking; use it as a context manager. address: "host:port".  tls: None is plain text."""

    def __init__(self, address: str, *, api_key: str = "", tls: TlsFiles | None = None) -> None:
        """Raises SetupError."""
        self.address = address
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        options = grpc_options(address)
        self._channel = (
            grpc.insecure_channel(address, options)
            if tls is None
            else grpc.secure_channel(address, tls.credentials(), options)
        )
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)

    def stream(
        self,
        prompt: str | Sequence[ChatMessage] | Sequence[int],
        params: SamplingParams,
        *,
        request_id: str = "",
    ) -> Iterator[pb.GenerateStreamResponse]:
        """Yields the pieces of an answer to a text, a conversation or token ids; closing the iterator cancels it.

        Raises ClusterError with the server's message.
        """
        request = pb.GenerateStreamRequest(request_id=request_id, sampling_params=from_sampling_params(params))
        if isinstance(prompt, str):
            request.text = prompt
        else:
            for part in prompt:
                if isinstance(part, int):
                    request.token_ids.ids.append(part)
                else:
                    request.chat.messages.append(pb.ChatMessage(role=part.role, content=part.content))
        call = self._stub.GenerateStream(request, metadata=self._metadata)
        try:
            yield from call
        except grpc.RpcError as error:
            raise self._error(error) from error
        finally:
            call.cancel()

    def model_info(self) -> pb.GetModelInfoResponse:
        """Raises ClusterError with the server's message."""
        try:
            reply: pb.GetModelInfoResponse = self._stub.GetModelInfo(pb.GetModelInfoRequest(), metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._error(error) from error
        return reply

    def is_serving(self, timeout_s: float) -> bool:
        """Whether the server says that it serves; false when it cannot be reached."""
        try:
            reply = health_pb2_grpc.HealthStub(self._channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError:
            return False
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _error(self, error: grpc.RpcError) -> ClusterError:
        code, details = error.code(), error.details() or ""
        if code == grpc.StatusCode.UNAVAILABLE and "failed to connect" in details:
            reason = details.rpartition("last error: ")[2]
            if "Connection refused" not in reason:
                return Unavailable(
                    f"no connection to {self.address} ({reason}): does the server speak TLS, trust this client's "
                    "certificate, and this client the server's? See --tls-ca, --tls-cert and --tls-key"
                )
            return Unavailable(f"no server answers at {self.address}: start one with `moe-cluster serve MODEL_DIR`")
        return _ERRORS.get(code, ClusterError)(f"{code.name}: {details}")
