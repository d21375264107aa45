"""Only a name: Ray and processes of other versions know the controller by this module (`cluster/evolving.py`)."""

from cluster.runtime.control.controller import ExpertController

__all__ = ["ExpertController"]
