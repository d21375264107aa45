"""Only a name: a Serve of before an upgrade makes replicas of this class by this module."""

from cluster.runtime.front.attention_replica import AttentionReplica

__all__ = ["AttentionReplica"]
