"""Only a name: a Serve of before an upgrade makes replicas of this class by this module."""

from cluster.runtime.front.ingress import Ingress

__all__ = ["Ingress"]
