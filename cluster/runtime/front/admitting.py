"""An ingress's admission, made of its configuration."""

import time
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path

import ray

from cluster.config import ClusterConfig
from cluster.runtime.ray_private.serve import RAY_SERVE_ENABLE_DIRECT_INGRESS
from cluster.serving.admission.admission import Admission, AdmissionLimits
from cluster.serving.admission.api_keys import ApiKeys
from cluster.serving.admission.keyless import KeylessLimits


def make_admission(config: ClusterConfig, room: Callable[[], float]) -> Admission:
    """room: as of `Admission`."""
    return Admission(
        _keys(config.api_keys_file),
        AdmissionLimits(
            max_calls=config.max_ongoing_requests,
            max_streams_per_client=config.max_streams_per_client,
            max_watchers=config.max_watchers,
            keyless=KeylessLimits(
                max_calls=config.max_keyless_calls,
                max_calls_per_host=config.max_keyless_calls_per_host,
                calls_per_minute=config.keyless_calls_per_minute,
            ),
        ),
        admins=_keys(config.admin_keys_file),
        # Behind HAProxy an ingress listens on all interfaces, and has no TLS.
        local_only=RAY_SERVE_ENABLE_DIRECT_INGRESS and ip_address(ray.util.get_node_ip_address()).is_loopback,
        room=room,
    )


def _keys(file: str) -> ApiKeys | None:
    return ApiKeys(Path(file), time.monotonic) if file else None
