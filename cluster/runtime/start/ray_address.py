"""Finds the address of a running Ray, and checks that it answers. Connects to none.

Ray itself would take the address that an ended cluster left behind, and try it for two minutes.
"""

import os
import socket
from contextlib import closing

from cluster.errors import SetupError
from cluster.inputs import is_host, is_port

CONNECT_TIMEOUT_S = 2.0
ANSWER_TIMEOUT_S = 5.0
AUTO = "auto"
CLIENT = "ray://"  # Ray's client protocol: its server is no GCS
TRY_ANOTHER = "start one with `ray start --head`, or give another --ray-address"
CONNECT_HINT = "give --ray-address, or run this where `moe-cluster serve` or `ray start` runs"


def find_ray(address: str | None) -> str:
    """The address of a Ray that answers: the given one, or for "auto" and None one of this machine.

    Raises SetupError within seconds.
    """
    if address and address != AUTO:
        check_address(address)
        return address
    tried = []
    for found in _left_addresses():
        try:
            check_address(found)
        except SetupError as error:
            tried.append(str(error).partition(": ")[0])
        else:
            return found
    reason = f" ({'; '.join(tried)})" if tried else ""
    raise SetupError(f"no running Ray cluster was found{reason}: {CONNECT_HINT}")


def check_address(address: str) -> None:
    """Raises SetupError where no Ray answers; Ray itself would try for a minute or two."""
    host, _, port = address.removeprefix(CLIENT).rpartition(":")
    if not is_host(host) or not is_port(port):
        raise SetupError(f"{address!r} is no address of a Ray: HOST:PORT or auto is needed")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise SetupError(f"no Ray answers at {address} ({error}): {TRY_ANOTHER}") from error
    if not address.startswith(CLIENT):
        _ask(address, TRY_ANOTHER)


def _ask(address: str, hint: str) -> None:
    """Raises SetupError where no Ray answers, or where it refuses this process."""
    import grpc  # the import takes seconds with ray: not worth it for an address where nobody listens
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    from cluster.runtime.ray_private.core import gcs_channel

    with closing(gcs_channel(address)) as channel:
        stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        try:
            stub.CheckAlive(gcs_service_pb2.CheckAliveRequest(), timeout=ANSWER_TIMEOUT_S)
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                raise SetupError(
                    f"the Ray at {address} asks for a token that this process does not have: set $RAY_AUTH_TOKEN, or "
                    "run this as the user who started it"
                ) from error
            raise SetupError(
                f"no Ray answers at {address} (something else listens, or its control service hangs: "
                f"{error.code().name}): {hint}"
            ) from error


def _left_addresses() -> list[str]:
    """Addresses where Rays of this machine may run: $RAY_ADDRESS, the last start's, those of running processes."""
    from cluster.runtime.ray_private.core import left_addresses

    asked = os.environ.get("RAY_ADDRESS")
    found = [asked if asked != AUTO else None, *left_addresses()]
    return list(dict.fromkeys(address for address in found if address))
