"""Only a name: configuration files and Ray's environment name these functions by this module."""

from cluster.runtime.front.serve_proxy import accept_pings, add_inference_service

__all__ = ["accept_pings", "add_inference_service"]
