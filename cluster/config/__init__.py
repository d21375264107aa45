"""Configuration: the checkpoint's (`ModelConfig`), the engine's and the cluster's.

All are frozen; derive a changed one with `dataclasses.replace`. What cannot work is refused when it is made:
SetupError, for the model's CheckpointError, with the field, the value and the limit.
"""

from cluster.config.architectures.registry import read_model_config
from cluster.config.cluster import TRANSPORTS, ClusterConfig, EngineConfig, Transport
from cluster.config.model import DTYPE_BYTES, DTYPES, ModelConfig, MoeConfig
from cluster.config.rope import RopeConfig

__all__ = [
    "DTYPES",
    "DTYPE_BYTES",
    "TRANSPORTS",
    "ClusterConfig",
    "EngineConfig",
    "ModelConfig",
    "MoeConfig",
    "RopeConfig",
    "Transport",
    "read_model_config",
]
