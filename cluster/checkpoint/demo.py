"""The name under which users' files and the chart import it: `cluster.checkpoint.made.demo` has the code."""

from cluster.checkpoint.made.demo import write_demo_checkpoint

__all__ = ["write_demo_checkpoint"]
