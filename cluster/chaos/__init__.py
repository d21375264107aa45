"""`moe-cluster chaos`: streams on a running cluster whose parts are killed, stopped, cut and moved meanwhile.

Every answer is compared token for token with the same one from before. Traffic comes by gRPC as from any client; faults
are injected through Ray.
"""

from cluster.chaos.command import add_arguments, check, run

__all__ = ["add_arguments", "check", "run"]
