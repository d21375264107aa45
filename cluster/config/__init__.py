"""Configuration: the checkpoint's (`ModelConfig`), the engine's and the cluster's.

All are frozen; derive a changed one with `dataclasses.replace`. A value that cannot work is refused at once: with
SetupError, or CheckpointError for the model's, that has the field, the value and the limit.
"""

from cluster.config.architectures.registry import read_model_config
from cluster.config.cluster import DEFAULTS, TRANSPORTS, ClusterConfig, Transport
from cluster.config.engine import EngineConfig
from cluster.config.model import DTYPE_BYTES, DTYPES, ModelConfig, MoeConfig
from cluster.config.rope import RopeConfig

__all__ = [
    "DEFAULTS",
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
