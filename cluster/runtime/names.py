"""The names by which the parts of a cluster find one another on Ray. Starts nothing."""

import hashlib
import json

from cluster.config import ClusterConfig

NAMESPACE = "moe-cluster"  # of all named actors, so that `ray list actors` shows them together
APPLICATION = "moe-cluster"  # of Serve
INGRESS, ATTENTION_REPLICA = "Ingress", "AttentionReplica"  # its deployments
RAY_FOLDER = "r"  # of a Ray of ours: it opens its folder to everybody, and the one above is closed
_CONTROLLER = ":controller"


def shard_group(config: ClusterConfig) -> str:
    """A name for the shards of a configuration: what would load or place them otherwise names them otherwise.

    A redeployed application with the same experts finds the running shards, whatever their number; one with others
    makes new ones beside.
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
    """A shard's placement group, and its actor unless that was a spare process."""
    return f"{shard_prefix(group)}{shard_id}"


def spare_prefix(group: str) -> str:
    """The names of all spare processes of a group begin like this."""
    return f"{group}:spare-"
