"""The Serve application for `serve deploy`: `import_path: cluster.app:build`."""

from pathlib import Path
from typing import Any

from ray import serve

from cluster.checkpoint.model_files import is_name
from cluster.config import ClusterConfig
from cluster.runtime.start.application import build_application, check_config


def build(args: dict[str, Any]) -> serve.Application:
    """Builds the application from a config file's `args`: the fields of `cluster.config.ClusterConfig`.

    Raises SetupError, which Serve shows as the application's message, for an unknown argument or a value out of range.
    """
    config = ClusterConfig.from_mapping(args)
    if is_name(config.model) or Path(config.model).is_dir():  # else the head has no model, and the replicas check it
        config = check_config(config)
    return build_application(config)
