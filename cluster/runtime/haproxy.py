"""Only a name: installed programs find HAProxy's start by this module."""

from cluster.runtime.front.haproxy import main

__all__ = ["main"]
