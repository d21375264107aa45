"""Only a name: deployed applications name their policy by this module."""

from cluster.runtime.front.autoscaling import replicas_by_load

__all__ = ["replicas_by_load"]
