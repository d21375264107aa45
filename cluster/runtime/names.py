"""The names by which the parts of a cluster find one another on Ray. Starts nothing."""

import hashlib
import json
import uuid

from cluster.config import ClusterConfig

NAMESPACE = "moe-cluster"  # of all named actors, so that `ray list actors` shows them together
APPLICATION = "moe-cluster"  # of Serve
INGRESS, ATTENTION_REPLICA = "Ingress", "AttentionReplica"  # its deployments
RAY_FOLDER = "r"  # the folder of a Ray of ours: Ray opens it to everybody, but the one above is closed
_CONTROLLER = ":controller"


def shard_group(config: ClusterConfig) -> str:
    """The name of a configuration's shards, a hash of all that decides which weights they read, and where they run.

    A redeployed application with the same experts finds the running shards, whatever their number; with others it
    makes new shards beside them.
    """
    fields = (
        config.model, config.dtype, config.device, config.gpus_per_expert_shard, config.cpus_per_expert_shard,
        config.metrics_port,
    )  # fmt: skip
    digest = hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:8]
    return f"moe-{digest}"


def controller_name(group: str) -> str:
    return group + _CONTROLLER


def group_of_controller(name: str) -> str | None:
    """The group whose controller has that name; None for another actor's name."""
    return name.removesuffix(_CONTROLLER) if name.endswith(_CONTROLLER) else None


def shard_prefix(group: str) -> str:
    """The names of all shards of a group begin like this."""
    return f"{group}:shard-"


def shard_name(group: str, shard_id: int) -> str:
    """The name of a shard's placement group, and of its actor unless that was a spare process."""
    return f"{shard_prefix(group)}{shard_id}"


def other_shard_name(group: str, shard_id: int) -> str:
    """Another name for the same: that of a shard which starts while its predecessor runs."""
    return f"{shard_name(group, shard_id)}-{uuid.uuid4().hex[:6]}"


def shard_of(group: str, name: str) -> int:
    """The shard that has a name of the two kinds above."""
    return int(name.removeprefix(shard_prefix(group)).partition("-")[0])


def spare_prefix(group: str) -> str:
    """The names of all spare processes of a group begin like this."""
    return f"{group}:spare-"


def responses_name(group: str) -> str:
    """The name of the actor that keeps the responses of `/v1/responses`."""
    return f"{group}:responses"


def carrier_name(group: str) -> str:
    """The name of the actor that has those responses while the process that keeps them is replaced."""
    return f"{group}:responses-carried"


def metrics_name(group: str, node_id: str) -> str:
    """The name of the actor that serves the metrics of a node."""
    return f"{group}:metrics-{node_id}"
