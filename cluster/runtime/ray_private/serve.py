"""Private names of Ray Serve (2.60). Apart from Ray's core: it takes a second to load."""

from typing import Any

from ray.serve._private.common import DeploymentID

# A list that each of Serve's gRPC servers reads at its start; Serve has no setting for pings.
# Whether HAProxy stands in front, as Serve has read it from its environment.
from ray.serve._private.constants import DEFAULT_GRPC_SERVER_OPTIONS, RAY_SERVE_ENABLE_DIRECT_INGRESS
from ray.serve.context import _get_global_client

__all__ = ["DEFAULT_GRPC_SERVER_OPTIONS", "RAY_SERVE_ENABLE_DIRECT_INGRESS", "ask_for_replicas"]


def ask_for_replicas(deployment: str, application: str, num_replicas: int) -> Any:
    """A reference to Serve's answer. The public way is HTTP to Ray's dashboard, which a Ray of ours has not."""
    controller = _get_global_client()._controller
    return controller.update_deployment_replicas.remote(DeploymentID(deployment, application), num_replicas)
