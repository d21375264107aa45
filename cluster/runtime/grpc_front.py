"""Where and how clients reach gRPC in HAProxy: the address, TLS, who signs clients' certificates.

It stands in the environment of Ray's nodes, and is read whenever HAProxy starts:

    MOE_CLUSTER_GRPC_HOST       the address to listen on; else that of Serve's http_options
    MOE_CLUSTER_TLS_CERT        PEM of the server's certificate and its chain: TLS only, 1.2 at least
    MOE_CLUSTER_TLS_KEY         PEM of its key, where that is not in the same file
    MOE_CLUSTER_TLS_CLIENT_CA   PEM of who signs clients' certificates: nobody without one comes in
"""

import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import SetupError

GRPC_HOST, TLS_CERT = "MOE_CLUSTER_GRPC_HOST", "MOE_CLUSTER_TLS_CERT"
TLS_KEY, TLS_CLIENT_CA = "MOE_CLUSTER_TLS_KEY", "MOE_CLUSTER_TLS_CLIENT_CA"


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpcFront:
    """Where and how clients reach gRPC. host: to listen on; "" is this machine only.  The rest are PEM files."""

    host: str = ""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None

    def environment(self) -> dict[str, str]:
        """What tells it to `main`. Raises SetupError for files that cannot serve."""
        self._check()
        files = {TLS_CERT: self.tls_cert, TLS_KEY: self.tls_key, TLS_CLIENT_CA: self.tls_client_ca}
        said = {name: str(path.resolve()) for name, path in files.items() if path is not None}
        return said | ({GRPC_HOST: self.host} if self.host else {})

    def _check(self) -> None:
        if self.tls_cert is None:
            if self.tls_key is not None or self.tls_client_ca is not None:
                raise SetupError("--tls-key and --tls-client-ca need --tls-cert, the server's certificate")
            return
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.tls_cert, self.tls_key, password=_no_password)
        except (OSError, ValueError) as error:  # ssl's errors are OSErrors
            raise SetupError(
                f"--tls-cert {self.tls_cert} and its key ({self.tls_key or 'in the same file'}) cannot be used: {error}"
            ) from error
        try:
            if self.tls_client_ca is not None:
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(self.tls_client_ca)
        except OSError as error:
            raise SetupError(f"--tls-client-ca {self.tls_client_ca} cannot be used: {error}") from error


def _no_password() -> str:
    raise ValueError("the key has a password, which nobody is there to type")


def tls_options(environment: Mapping[str, str], folder: Path) -> str:
    """What makes a `bind` of HAProxy's speak TLS as the environment asks for; "" for no TLS. Raises OSError.

    HAProxy takes certificate and key from one file: it is made in `folder`, for this user only.
    """
    cert, key, client_ca = (environment.get(name) for name in (TLS_CERT, TLS_KEY, TLS_CLIENT_CA))
    if not cert:
        return ""
    pem = _private_copy([cert, *([key] if key else [])], folder / "grpc.pem")
    options = f" ssl crt {pem} ssl-min-ver TLSv1.2 alpn h2"
    if client_ca:
        options += f" ca-file {_private_copy([client_ca], folder / 'grpc-clients.pem')} verify required"
    return options


def _private_copy(sources: list[str], target: Path) -> Path:
    """One after the other; whole at once, so that a HAProxy that starts meanwhile reads the old one or the new."""
    made = target.with_suffix(f".{os.getpid()}")
    made.unlink(missing_ok=True)
    with open(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
        for source in sources:
            out.write(Path(source).read_bytes().rstrip() + b"\n")
    return made.replace(target)
