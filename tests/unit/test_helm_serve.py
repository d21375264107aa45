"""The chart's configuration for Ray Serve: an application that it takes, with arguments that the application takes."""

import json
import math
from collections.abc import Mapping
from dataclasses import fields

import pytest
import ray
import yaml
from helm_charts import CHART, SHAPES, container, rendered
from ray.autoscaler._private.kuberay.autoscaling_config import _get_ray_resources_from_group_spec
from ray.serve.schema import ServeDeploySchema

from cluster.cli import _parser
from cluster.config import ClusterConfig
from cluster.config.options import limits_of, type_of
from cluster.runtime.start.application import GRPC_SERVICERS

KNOWN = {field.name for field in fields(ClusterConfig)}
SET_BY_THE_CHART = {
    "model", "metrics_host", "ingress_resource", "attention_resource", "expert_resource", "api_keys_file",
    "admin_keys_file",
}  # fmt: skip
KINDS = {int: "integer", float: "number", bool: "boolean", str: "string", Mapping: "object"}
KEYS = {"apiKeys": {"enabled": True, "existingSecret": "keys"}, "adminKeys": {"existingSecret": "admins"}}


def arguments(objects):
    [application] = objects.serve_config["applications"]
    return application["args"]


@pytest.mark.parametrize("shape", SHAPES)
def test_serve_takes_the_configuration(shape):
    schema = ServeDeploySchema.model_validate(rendered(shape).serve_config)
    assert schema.grpc_options.grpc_servicer_functions == GRPC_SERVICERS
    assert schema.grpc_options.request_timeout_s is None  # it would end long streams
    assert schema.http_options.host == "0.0.0.0"  # HAProxy binds gRPC to it too
    [application] = schema.applications
    assert application.import_path == "cluster.app:build"
    assert application.external_scaler_enabled == ("max_attention_replicas" not in application.args)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_application_takes_the_arguments(shape):
    args = arguments(rendered(shape, KEYS))
    assert args.keys() >= SET_BY_THE_CHART
    unknown = SET_BY_THE_CHART - KNOWN
    config = ClusterConfig.from_mapping({name: value for name, value in args.items() if name not in unknown})
    assert config.metrics_host == "0.0.0.0"


def test_every_argument_can_be_set():
    """Those that the chart does not set are in the values' schema, and no others."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    settable = set(schema["properties"]["cluster"]["properties"])
    assert settable == KNOWN - SET_BY_THE_CHART


def test_the_charts_schema_has_the_fields_types_and_limits():
    """But a pod's user may open no port below 1024, and finds none by chance."""
    schema = json.loads((CHART / "values.schema.json").read_text())["properties"]["cluster"]["properties"]
    for field in fields(ClusterConfig):
        if field.name in SET_BY_THE_CHART:
            continue
        limits = limits_of(field)
        kind = KINDS[type_of(ClusterConfig, field.name)]
        expected = {
            "type": [kind, "null"] if field.default is None else kind,
            "minimum": None if limits.least == -math.inf else limits.least,
            "maximum": None if limits.most == math.inf else limits.most,
        }
        if limits.choices:
            expected = {"enum": list(limits.choices)}
        if field.name == "metrics_port":
            expected["minimum"] = 1024
        if field.name == "lora_adapters":
            expected["additionalProperties"] = {"type": "string", "minLength": 1}
        assert schema[field.name] == {key: value for key, value in expected.items() if value is not None}, field.name


def test_values_pass_through_as_they_are():
    args = arguments(rendered("57b"))
    assert args["kv_cache_bytes"] == 40 * 2**30
    assert isinstance(args["kv_cache_bytes"], int)
    assert args["drain_timeout_s"] == 120.5
    assert args["min_copies"] == 2
    assert args["model"] == "/models/Qwen2-57B-A14B-Instruct"


def test_gpus_of_a_process_follow_its_group_unless_said():
    assert arguments(rendered("laptop"))["gpus_per_attention_replica"] == 0
    assert arguments(rendered("laptop"))["gpus_per_expert_shard"] == 0
    assert arguments(rendered("a2.7b"))["gpus_per_expert_shard"] == 1
    halves = rendered("a2.7b", {"cluster.gpus_per_expert_shard": 0.5, "cluster.expert_shards": 4})
    assert arguments(halves)["gpus_per_expert_shard"] == 0.5


def test_the_ranks_of_a_replica_take_a_pods_gpus():
    found = arguments(rendered("a2.7b", {"cluster.tensor_parallel_size": 4, "groups.attention.gpus": 4}))
    assert (found["tensor_parallel_size"], found["gpus_per_attention_replica"]) == (4, 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_roles_and_groups_agree_on_the_resource_that_steers_them(shape):
    objects = rendered(shape)
    args = arguments(objects)
    steered = {
        "ingress": args["ingress_resource"],
        "attention": args["attention_resource"],
        "experts": args["expert_resource"],
    }
    for role, group in objects.groups.items():
        assert group["resources"].keys() - {"GPU"} == {steered[role]}
    assert objects.cluster["headGroupSpec"]["resources"] == {"CPU": "0", "GPU": "0"}


@pytest.mark.parametrize("shape", SHAPES)
def test_ray_reads_a_groups_resources_as_they_are_meant(shape):
    """By the code with which Ray's autoscaler reads a RayCluster."""
    objects = rendered(shape)
    assert _get_ray_resources_from_group_spec(objects.cluster["headGroupSpec"], True)["CPU"] == 0
    for role, group in objects.groups.items():
        found = _get_ray_resources_from_group_spec(group, False)
        limits = container(group["template"])["resources"]["limits"]
        assert found[f"moe_{role}"] == 1000
        assert found.get("GPU", 0) == int(limits.get("nvidia.com/gpu", 0))
        assert found["CPU"] >= 1


def test_the_image_is_expected_to_have_the_ray_that_is_tested():
    assert rendered("a2.7b").cluster["rayVersion"] == ray.__version__


def test_pods_come_and_go_only_with_an_autoscaler():
    fixed = rendered("a2.7b", {"groups.attention.maxReplicas": 3})
    assert fixed.groups["attention"]["maxReplicas"] == 1
    assert fixed.cluster["enableInTreeAutoscaling"] is False
    scaled = rendered("cpu-experts")
    assert scaled.groups["attention"]["maxReplicas"] == 3
    assert scaled.cluster["enableInTreeAutoscaling"] is True
    assert scaled.cluster["autoscalerOptions"]["volumeMounts"] == [{"name": "tmp", "mountPath": "/tmp"}]


def test_an_upgrade_is_a_second_cluster_unless_it_is_off():
    spec = rendered("a2.7b").one("RayService")["spec"]
    assert spec["upgradeStrategy"] == {"type": "NewCluster"}
    assert spec["excludeHeadPodFromServeSvc"] is True
    off = rendered("a2.7b", {"upgrade": {"type": "None", "initializingTimeout": "2h"}}).one("RayService")
    assert off["spec"]["upgradeStrategy"] == {"type": "None"}
    assert off["metadata"]["annotations"] == {"ray.io/initializing-timeout": "2h"}


def test_the_smoke_test_calls_the_service():
    objects = rendered("a2.7b")
    [found] = objects.one("Pod")["spec"]["containers"]
    service = objects.one("Service")
    assert found["command"] == ["moe-cluster", "generate"]
    assert f"--address={service['metadata']['name']}:{service['spec']['ports'][0]['port']}" in found["args"]
    assert objects.one("Pod")["metadata"]["annotations"]["helm.sh/hook"] == "test"


def test_the_smoke_tests_arguments_are_the_command_lines():
    [found] = rendered("a2.7b").one("Pod")["spec"]["containers"]
    parsed = _parser().parse_args([*found["command"][1:], *found["args"]])
    assert parsed.prompt == ["Hello"]
    assert parsed.max_tokens == 4


def test_serve_config_is_text_of_yaml():
    text = rendered("a2.7b").one("RayService")["spec"]["serveConfigV2"]
    assert isinstance(text, str)
    assert yaml.safe_load(text)["proxy_location"] == "EveryNode"
