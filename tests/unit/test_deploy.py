"""The files in deploy/ are accepted by what reads them."""

from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from cluster.config import ClusterConfig
from cluster.runtime.launch import GRPC_SERVICERS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def schema():
    """deploy/serve.yaml as `serve deploy` reads it; an unknown key is an error."""
    return ServeDeploySchema.model_validate(yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text()))


def found(path):
    module, _, name = path.replace(":", ".").rpartition(".")
    return getattr(import_module(module), name)


def test_the_application_can_be_imported(schema):
    [application] = schema.applications
    assert application.import_path == "cluster.app:build"
    assert callable(found(application.import_path))


def test_the_arguments_are_ours_all_but_none_left_out(schema):
    """Every field stands in the file, so that a newcomer sees what there is."""
    [application] = schema.applications
    config = ClusterConfig.from_mapping(application.args)
    assert config.expert_shards == 2
    assert set(application.args) == {field.name for field in fields(ClusterConfig)}


def test_the_proxy_registers_what_the_command_line_registers(schema):
    assert schema.grpc_options.grpc_servicer_functions == GRPC_SERVICERS
    assert [path for path in GRPC_SERVICERS if not callable(found(path))] == []
    assert schema.grpc_options.enable_reflection
    assert schema.grpc_options.request_timeout_s is None  # it would end long streams
