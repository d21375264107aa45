"""The options that Serve gets with the deployments. Starts no Ray."""

import pytest

from cluster.config import ClusterConfig
from cluster.errors import SetupError
from cluster.runtime.start import application as module


def options_of(monkeypatch, **fields):
    """Of the attention replicas, and of the ingresses."""
    monkeypatch.setattr(module, "resolve_gpus", lambda config: config)
    monkeypatch.setattr(module, "actor_environment", lambda *args: {})
    config = ClusterConfig(model="model", gpus_per_attention_replica=0, gpus_per_expert_shard=0, **fields)
    ingress = module.build_application(config)._bound_deployment
    [replicas] = [a._bound_deployment for a in ingress.init_args if hasattr(a, "_bound_deployment")]
    return replicas._deployment_config, ingress._deployment_config


def test_a_rollout_needs_no_room_for_more_replicas_unless_it_is_given_some(monkeypatch):
    replicas, ingress = options_of(monkeypatch)
    assert (replicas.max_surge_percent, replicas.rolling_update_percentage) == (0, 0.2)
    assert ingress.max_surge_percent == 100, "the only ingress may go once there is another"
    replicas, ingress = options_of(monkeypatch, max_surge_percent=50, rolling_update_percentage=1.0)
    assert (replicas.max_surge_percent, replicas.rolling_update_percentage) == (50, 1.0)
    assert ingress.max_surge_percent == 100


@pytest.mark.parametrize("fields", [{"max_surge_percent": 101}, {"rolling_update_percentage": 0}])
def test_what_serve_would_refuse_is_refused_before(fields):
    with pytest.raises(SetupError, match=next(iter(fields))):
        ClusterConfig(model="model", **fields)
