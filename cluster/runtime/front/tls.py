"""Where and how clients reach gRPC and HTTP in HAProxy: the address, TLS, the authorities of clients' certificates.

The environment of Ray's nodes has it, and HAProxy reads it at each start; changed files count within seconds:

    MOE_CLUSTER_GRPC_HOST       the address to listen on; else that of Serve's http_options
    MOE_CLUSTER_TLS_CERT        PEM of the server's certificate and its chain: TLS only, 1.2 at least
    MOE_CLUSTER_TLS_KEY         PEM of its key, unless that is in the same file
    MOE_CLUSTER_TLS_CLIENT_CA   PEM of the authorities of clients' certificates: no client comes in without one
"""

import socket
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2s
from pathlib import Path

from cluster.errors import SetupError
from cluster.runtime.front.renewal import Copy, no_password

GRPC_HOST, TLS_CERT = "MOE_CLUSTER_GRPC_HOST", "MOE_CLUSTER_TLS_CERT"
TLS_KEY, TLS_CLIENT_CA = "MOE_CLUSTER_TLS_KEY", "MOE_CLUSTER_TLS_CLIENT_CA"


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpcFront:
    """Where and how clients reach the server. host: to listen on; "" is this machine only. The others are PEM files."""

    host: str = ""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None

    def environment(self) -> dict[str, str]:
        """The environment that `main` reads. Raises SetupError for files that cannot serve."""
        self._check()
        files = {TLS_CERT: self.tls_cert, TLS_KEY: self.tls_key, TLS_CLIENT_CA: self.tls_client_ca}
        paths = {name: str(path.resolve()) for name, path in files.items() if path is not None}
        return paths | ({GRPC_HOST: self.host} if self.host else {})

    def address(self, port: int) -> str:
        """Returns the address for a user to read."""
        host = f"[{self.host}]" if ":" in self.host else self.host or "127.0.0.1"
        return f"{host}:{port}{' (TLS)' if self.tls_cert else ''}"

    def url(self, port: int) -> str:
        """Returns the address of the HTTP API for a user to read."""
        return f"http{'s' if self.tls_cert else ''}://{self.address(port).removesuffix(' (TLS)')}"

    def _check(self) -> None:
        try:
            with socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET) as probe:
                probe.bind((self.host, 0))
        except OSError as error:
            raise SetupError(f"--host {self.host} is no address of this machine ({error.strerror})") from error
        if self.tls_cert is None:
            if self.tls_key is not None or self.tls_client_ca is not None:
                raise SetupError("--tls-key and --tls-client-ca need --tls-cert, the server's certificate")
            return
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.tls_cert, self.tls_key, password=no_password)
        except (OSError, ValueError) as error:  # ssl's errors are OSErrors
            raise SetupError(
                f"--tls-cert {self.tls_cert} and its key ({self.tls_key or 'in the same file'}) cannot be used: "
                f"{_tls_reason(error)}"
            ) from error
        try:
            if self.tls_client_ca is not None:
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(self.tls_client_ca)
        except OSError as error:
            raise SetupError(f"--tls-client-ca {self.tls_client_ca} cannot be used: {_tls_reason(error)}") from error


def _tls_reason(error: Exception) -> str:
    """OpenSSL's message, or a clearer one for a file that is no PEM, or lacks its certificate or its key."""
    if isinstance(error, ssl.SSLError) and error.reason in (None, "NO_CERTIFICATE_OR_CRL_FOUND"):
        return "PEM text is needed, with a block -----BEGIN CERTIFICATE-----, and for --tls-cert one of its private key"
    return str(error)


def tls_files(environment: Mapping[str, str], folder: Path) -> list[Copy]:
    """The files in `folder` that HAProxy needs for the TLS of the environment; none for no TLS.

    HAProxy takes certificate and key from one file. A file's name tells its sources: when a renewal cannot be used, the
    old file stays, and never one of another configuration or cluster.
    """
    cert, key, client_ca = (environment.get(name, "") for name in (TLS_CERT, TLS_KEY, TLS_CLIENT_CA))
    if not cert:
        return []
    sources = blake2s("\n".join((cert, key, client_ca)).encode(), digest_size=4).hexdigest()
    pair = Copy(folder / f"grpc-{sources}.pem", "cert", [cert, *([key] if key else [])])
    return [pair, *([Copy(folder / f"grpc-clients-{sources}.pem", "ca-file", [client_ca])] if client_ca else [])]


def tls_options(copies: Sequence[Copy]) -> str:
    """The options of HAProxy's `bind` for TLS with these files; "" for none."""
    of_kind = {copy.kind: copy.path for copy in copies}
    if not of_kind:
        return ""
    options = f" ssl crt {of_kind['cert']} ssl-min-ver TLSv1.2 alpn h2"
    return options + (f" ca-file {of_kind['ca-file']} verify required" if "ca-file" in of_kind else "")
