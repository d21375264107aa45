"""The chart renders, with both Helms alike, to objects that an API server takes; what is wrong is refused in words."""

import re

import pytest
import yaml
from helm_charts import CHART, SHAPES, Refused, any_helm, helm, rendered, values_of
from helm_schemas import KUBE_VERSIONS, SPECS, problems, published

import cluster

# Every optional object at once, and the other branch of each choice.
EVERYTHING = {
    "autoscaling.enabled": True,
    "apiKeys": {"enabled": True, "content": "hashed"},
    "smokeTest.apiKeySecret": {"name": "smoke", "key": "k"},
    "ingress": {"enabled": True, "host": "moe.example.com"},
    "tls": {"certManager": {"enabled": True, "issuerRef": {"name": "ca"}}},
    "grpcRoute": {"enabled": True, "parentRefs": [{"name": "public"}], "hostnames": ["moe.example.com"]},
    "httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}], "hostnames": ["api.example.com"]},
    "networkPolicy.egress": {"restricted": True},
    "gcsFaultTolerance": {"enabled": True, "redisAddress": "redis:6379", "passwordSecret": {"name": "redis"}},
    "upgrade": {"type": "None", "initializingTimeout": "2h"},
    "rayAuth.existingSecret": "ray-token",
    "imagePullSecrets": [{"name": "registry"}],
    "service": {"headless": True, "annotations": {"a": "b"}},
    "extraEnv": [{"name": "A", "value": "b"}],
    "extraVolumes": [{"name": "more", "emptyDir": {}}],
    "extraVolumeMounts": [{"name": "more", "mountPath": "/more"}],
    "commonLabels": {"team": "serving"},
}
VARIANTS = [(shape, None) for shape in SHAPES] + [("a2.7b", EVERYTHING)]


@pytest.mark.parametrize("version", [3, 4])
@pytest.mark.parametrize(("shape", "changes"), VARIANTS)
def test_lint_is_silent_even_when_strict(shape, changes, version):
    assert helm(version).lint(values_of(shape, changes)) == []


@pytest.mark.parametrize(("shape", "changes"), VARIANTS)
def test_both_helms_render_the_same_objects(shape, changes):
    def named(objects):
        return {(found["kind"], found["metadata"]["name"]): found for found in objects.all}

    assert named(rendered(shape, changes, version=3)) == named(rendered(shape, changes, version=4))


@pytest.mark.parametrize("kube_version", KUBE_VERSIONS)
@pytest.mark.parametrize(("shape", "changes"), VARIANTS)
def test_kubernetes_knows_every_field(shape, changes, kube_version):
    wrong = [line for found in rendered(shape, changes).all for line in problems(found, kube_version)]
    assert wrong == []


@pytest.mark.parametrize(("shape", "changes"), VARIANTS)
def test_the_published_definitions_know_every_field(shape, changes):
    validators = published()
    for found in rendered(shape, changes).all:
        if (found["apiVersion"], found["kind"]) in SPECS:
            validator = validators[found["apiVersion"], found["kind"]]
            assert [f"{error.json_path}: {error.message}" for error in validator.iter_errors(found)] == []


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("RayService", lambda spec: spec.update(serveConfig="x")),
        ("RayService", lambda spec: spec["rayClusterConfig"].update(tokens=1)),
        ("RayService", lambda spec: spec["rayClusterConfig"]["workerGroupSpecs"][0].update(replicas="2")),
        ("RayService", lambda spec: spec["rayClusterConfig"]["headGroupSpec"]["template"]["spec"].update(volume=[])),
        ("RayService", lambda spec: spec["serveService"]["spec"]["ports"][0].update(portt=1)),
        ("NetworkPolicy", lambda spec: spec.update(selector={})),
        ("PodMonitor", lambda spec: spec["podMetricsEndpoints"][0].update(ports="x")),
    ],
)
def test_a_wrong_field_would_be_found(kind, change):
    found = yaml.safe_load(yaml.safe_dump(rendered("a2.7b").of(kind)[0]))
    assert problems(found, KUBE_VERSIONS[-1]) == []
    change(found["spec"])
    assert problems(found, KUBE_VERSIONS[-1]) != []


def test_no_two_objects_have_one_name():
    for shape, changes in VARIANTS:
        names = [(found["kind"], found["metadata"]["name"]) for found in rendered(shape, changes).all]
        assert len(names) == len(set(names))


REFUSED = {
    "unknown value": ({"replicas": 3}, "replicas"),
    "unknown value deep down": ({"groups.experts.replica": 3}, "replica"),
    "unknown argument of the application": ({"cluster.expert_shard": 3}, "expert_shard"),
    "argument that the chart sets": ({"cluster.model": "/models/x"}, "model"),
    "no image": ({"image.repository": ""}, "repository"),
    "text for a number": ({"groups.attention.gpus": "one"}, "gpus"),
    "number for a text": ({"commonLabels": {"team": 1}}, "commonLabels"),
    "no pods in a group": ({"groups.ingress.replicas": 0}, "replicas"),
    "fewer than no shards": ({"cluster.expert_shards": -1}, "expert_shards"),
    "dtype that there is not": ({"cluster.dtype": "int4"}, "dtype"),
    "a model's name without a place": ({"model.source": {}}, "where is Qwen1.5-MoE-A2.7B-Chat?"),
    "a model from two places": ({"model.source.pvc": {"claimName": "models"}}, "source"),
    "a model from a place unknown": ({"model.source": {"git": {}}}, "git"),
    "a model's name with a slash": ({"model.name": "Qwen/Qwen1.5-MoE-A2.7B"}, "name"),
    "an address without a scheme": ({"model.source": {"objectStorage": {"url": "bucket/model"}}}, "url"),
    "a directory without a name": (
        {"model.source": {"pvc": {"claimName": "models"}}, "model.name": ""},
        "model.name is missing",
    ),
    "a hub without a scheme": (
        {"model.source": {"huggingFace": {"repository": "a/b", "endpoint": "hub"}}},
        "endpoint",
    ),
    "a revision with odd characters": (
        {"model.source": {"huggingFace": {"repository": "a/b", "revision": "c d"}}},
        "revision",
    ),
    "a repository without an owner": ({"model.source": {"huggingFace": {"repository": "Qwen"}}}, "repository"),
    "a long name": ({"fullnameOverride": "q" * 48}, "fullnameOverride"),
    "a name that begins with a digit": ({"fullnameOverride": "2-moe"}, "fullnameOverride"),
    "a size without a number": ({"groups.experts.sharedMemory": "big"}, "sharedMemory"),
    "a port below 1024": ({"cluster.metrics_port": 80}, "metrics_port"),
    "an upgrade that gRPC does not survive": ({"upgrade.type": "NewClusterWithIncrementalUpgrade"}, "type"),
    "two caches": ({"model.cache": {"claimName": "a", "hostPath": "/b"}}, "model.cache"),
    "more shards than GPUs": ({"cluster.expert_shards": 3}, "groups.experts has 2 pods with 1 GPUs"),
    "more replicas than GPUs": ({"cluster.attention_replicas": 2}, "groups.attention has 1 pods with 1 GPUs"),
    "ranks of a replica on several pods": (
        {"cluster.tensor_parallel_size": 2, "groups.attention.replicas": 2},
        "groups.attention has pods with 1 GPUs each, and the 2 ranks of an attention replica are in one pod",
    ),
    "more ranks than GPUs": (
        {"cluster.tensor_parallel_size": 2, "cluster.attention_replicas": 2, "groups.attention.gpus": 2},
        "groups.attention has 1 pods with 2 GPUs each, 4 ranks of attention replicas",
    ),
    "an ingress pod without a process": ({"groups.ingress.replicas": 3}, "cluster.ingress_replicas is 2"),
    "more pods than the most": (
        {"autoscaling.enabled": True, "groups.experts.maxReplicas": 1},
        "groups.experts.replicas is 2, at least minReplicas (2) and at most maxReplicas (1)",
    ),
    "fewer pods than the fewest": (
        {"autoscaling.enabled": True, "groups.attention.minReplicas": 2},
        "groups.attention.replicas is 1, at least minReplicas (2)",
    ),
    "keys without a file": ({"apiKeys.enabled": True}, "apiKeys.existingSecret"),
    "an ingress without a host": ({"ingress.enabled": True}, "ingress.host"),
    "a route without a gateway": ({"grpcRoute.enabled": True}, "grpcRoute.parentRefs"),
    "a certificate without an issuer": (
        {"tls.certManager.enabled": True, "ingress": {"enabled": True, "host": "a.example.com"}},
        "issuerRef.name",
    ),
    "a certificate without a host": ({"tls.certManager.enabled": True}, "ingress.host"),
    "client certificates without their authority": (
        {"tls.clientCertificates": True, "ingress": {"enabled": True, "host": "a.example.com"}},
        "ca.crt",
    ),
    "Redis without an address": ({"gcsFaultTolerance.enabled": True}, "gcsFaultTolerance.redisAddress"),
    "Redis without a port": ({"gcsFaultTolerance": {"enabled": True, "redisAddress": "redis"}}, "redisAddress"),
    "a headless load balancer": ({"service": {"headless": True, "type": "LoadBalancer"}}, "service.headless"),
}


@pytest.mark.parametrize(("changes", "named"), REFUSED.values(), ids=REFUSED)
def test_wrong_values_are_refused_by_name(changes, named):
    with pytest.raises(Refused, match=re.escape(named)):
        any_helm().render(values_of("a2.7b", changes))


@pytest.mark.parametrize(
    "case", ["unknown value", "a model from two places", "no pods in a group", "keys without a file"]
)
def test_helm_3_refuses_them_too(case):
    changes, named = REFUSED[case]
    with pytest.raises(Refused, match=re.escape(named)):
        helm(3).render(values_of("a2.7b", changes))


def test_a_release_with_a_long_name_says_what_to_set():
    with pytest.raises(Refused, match="KubeRay takes 47: set fullnameOverride"):
        any_helm().render(values_of("a2.7b"), "r" * 40)


def test_the_chart_has_the_packages_version():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == cluster.__version__
