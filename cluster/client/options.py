"""The options of the command line's clients, and the client that they make; its API key may be in the environment."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import SetupError
from cluster.inputs import is_host, is_port

if TYPE_CHECKING:
    from cluster.client.grpc_client import Client

DEFAULT_ADDRESS = "127.0.0.1:9000"
API_KEY = "MOE_CLUSTER_API_KEY"
MAX_KEY_FILE_BYTES = 1 << 16
TARGETS = ("unix:", "unix-abstract:", "vsock:", "dns:", "ipv4:", "ipv6:", "xds:")  # of gRPC
SECURITY = ("api_key_file", "tls", "tls_ca", "tls_cert", "tls_key")  # as `add_security_arguments` adds them


def add_arguments(parser: argparse.ArgumentParser, address: str | None = DEFAULT_ADDRESS) -> None:
    """address: of the server where none is given; None for no server then."""
    note = "" if address is None else " (default: %(default)s)"
    parser.add_argument("--address", default=address, metavar="HOST:PORT", help=f"gRPC server{note}")
    parser.add_argument(
        "--adapter", default="", metavar="NAME", help="of the server's LoRA adapter that answers (default: the model)"
    )
    add_security_arguments(parser)


def add_security_arguments(parser: argparse.ArgumentParser) -> None:
    """The client's key and certificates, for any protocol."""
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help=f"with the API key (default: ${API_KEY})")
    parser.add_argument("--tls", action="store_true", help="speak TLS, with the authorities that this machine trusts")
    parser.add_argument(
        "--tls-ca",
        type=Path,
        metavar="FILE",
        help="speak TLS; PEM of the authority that signed the server's certificate",
    )
    parser.add_argument(
        "--tls-cert", type=Path, metavar="FILE", help="PEM of this client's certificate, where one is asked for"
    )
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="PEM of its key")


def connect(args: argparse.Namespace, *, goes_on: bool = True) -> "Client":
    """goes_on: an answer whose connection breaks goes on over another one. Raises SetupError."""
    check_address(args.address)
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # the error, one line, has gRPC's log lines already
    from cluster.client.going_on import PATIENCE_S
    from cluster.client.grpc_client import Client, TlsFiles  # grpc loads with it: not for --help

    wanted = args.tls or args.tls_ca or args.tls_cert or args.tls_key
    tls = TlsFiles(ca=args.tls_ca, cert=args.tls_cert, key=args.tls_key) if wanted else None
    return Client(
        args.address,
        api_key=api_key(args.api_key_file),
        tls=tls,
        adapter=args.adapter,
        patience_s=PATIENCE_S if goes_on else None,
    )


def check_address(address: str) -> None:
    """Raises SetupError. A host alone has gRPC's own port; a target such as unix:/run/x or dns:///x:1 is gRPC's
    matter."""
    host, colon, port = address.rpartition(":")
    alone = not colon or "]" in port or (":" in host and not host.endswith("]"))  # an address of IPv6 has colons
    named = is_host(address) if alone else is_host(host) and is_port(port)
    if not named and not address.startswith(TARGETS):
        raise SetupError(f"--address is {address!r}, HOST:PORT is needed, without http://")


def api_key(path: Path | None) -> str:
    """Raises SetupError for a file without exactly one key, and for a text that is no key."""
    if path is None:
        return _checked(os.environ.get(API_KEY, ""), f"${API_KEY}")
    source = f"--api-key-file {path}"
    try:
        with path.open("rb") as file:
            text = file.read(MAX_KEY_FILE_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise SetupError(f"{source} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SetupError(f"{source} is no text (byte {error.start}): a file with one key alone is needed") from None
    key = _checked(text, source)
    if not key:
        raise SetupError(f"{source} is empty: a file with one key alone is needed")
    return key


def _checked(text: str, source: str) -> str:
    """Returns the one key in a text, "" for none."""
    words = text.split()
    if len(words) > 1:
        raise SetupError(
            f"{source} has {len(words)} words in {len(text.splitlines())} lines: one key alone is needed, as "
            "`moe-cluster keys new` prints it"
        )
    if not all("!" <= char <= "~" for char in "".join(words)):
        raise SetupError(f"{source} has characters that no key has: ASCII without spaces is needed")
    return "".join(words)
