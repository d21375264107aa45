"""Only a name: processes of other versions know these classes by this module (`cluster/evolving.py`)."""

from cluster.runtime.workers.protocol import ClusterRecord, Membership
from cluster.status import ClusterStatus, Fault, ProcessInfo, ReplicaStatus, ShardStatus

__all__ = ["ClusterRecord", "ClusterStatus", "Fault", "Membership", "ProcessInfo", "ReplicaStatus", "ShardStatus"]
