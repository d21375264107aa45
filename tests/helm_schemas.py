"""Finds what an API server would refuse: native kinds by Kubernetes' schemas, custom ones by schemas of their fields.

The latter are written by hand after the definitions of KubeRay 1.7.0, prometheus-operator, Gateway API and
cert-manager, with the fields that a chart like this one may set; all else counts as unknown. $CRDS may name a folder
with the published definitions themselves.
"""

import json
import os
from functools import cache
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

KUBE_VERSIONS = ("1.27.0", "1.31.0", "1.34.0", "1.37.0")  # the oldest of the chart to the newest of the package

TEXT, FLAG, ANY = {"type": "string"}, {"type": "boolean"}, {"type": "object"}
COUNT = {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": TEXT}


def fields(required=(), **properties):
    return {"type": "object", "additionalProperties": False, "properties": properties, "required": list(required)}


def items(schema):
    return {"type": "array", "items": schema}


def one_of(*values):
    return {"enum": list(values)}


_GROUP = {"resources": TEXTS, "labels": TEXTS, "rayStartParams": TEXTS, "template": ANY}
RAY_SERVICE = fields(
    ["rayClusterConfig"],
    serveConfigV2=TEXT,
    serveService=ANY,
    upgradeStrategy=fields(type=one_of("NewCluster", "None")),
    rayClusterDeletionDelaySeconds=COUNT,
    excludeHeadPodFromServeSvc=FLAG,
    suspend=FLAG,
    rayClusterConfig=fields(
        ["headGroupSpec"],
        rayVersion=TEXT,
        enableInTreeAutoscaling=FLAG,
        autoscalerOptions=fields(
            version=one_of("v1", "v2"),
            idleTimeoutSeconds=COUNT,
            upscalingMode=one_of("Default", "Aggressive", "Conservative"),
            resources=ANY,
            securityContext=ANY,
            env=items(ANY),
            envFrom=items(ANY),
            volumeMounts=items(ANY),
            image=TEXT,
            imagePullPolicy=TEXT,
        ),
        authOptions=fields(mode=one_of("disabled", "token"), secretName=TEXT),
        gcsFaultToleranceOptions=fields(
            backend=one_of("redis", "rocksdb"),
            redisAddress=TEXT,
            redisUsername=fields(value=TEXT, valueFrom=ANY),
            redisPassword=fields(value=TEXT, valueFrom=ANY),
            externalStorageNamespace=TEXT,
        ),
        headGroupSpec=fields(["template"], **_GROUP, serviceType=TEXT, headService=ANY, enableIngress=FLAG),
        workerGroupSpecs=items(
            fields(
                ["groupName", "minReplicas", "maxReplicas", "template"],
                **_GROUP,
                groupName=TEXT,
                replicas=COUNT,
                minReplicas=COUNT,
                maxReplicas=COUNT,
                numOfHosts=COUNT,
                idleTimeoutSeconds=COUNT,
                priority=COUNT,
            )
        ),
    ),
)
_PEER = fields(["name"], name=TEXT, namespace=TEXT, group=TEXT, kind=TEXT, sectionName=TEXT, port=COUNT)
SPECS = {
    ("ray.io/v1", "RayService"): RAY_SERVICE,
    ("monitoring.coreos.com/v1", "PodMonitor"): fields(
        ["selector"],
        selector=fields(matchLabels=TEXTS),
        podTargetLabels=items(TEXT),
        podMetricsEndpoints=items(
            fields(
                port=TEXT,
                path=TEXT,
                interval={"type": "string", "pattern": "^[0-9]+[smh]$"},
                relabelings=items(fields(action=one_of("replace"), targetLabel=TEXT, replacement=TEXT)),
            )
        ),
    ),
    ("monitoring.coreos.com/v1", "PrometheusRule"): fields(
        groups=items(
            fields(
                ["name"],
                name=TEXT,
                interval=TEXT,
                rules=items(
                    fields(
                        ["expr"], record=TEXT, alert=TEXT, expr=TEXT, labels=TEXTS, annotations=TEXTS, **{"for": TEXT}
                    )
                ),
            )
        )
    ),
    ("gateway.networking.k8s.io/v1", "GRPCRoute"): fields(
        parentRefs=items(_PEER),
        hostnames=items(TEXT),
        rules=items(
            fields(
                matches=items(fields(method=fields(type=one_of("Exact"), service=TEXT, method=TEXT))),
                backendRefs=items(_PEER),
            )
        ),
    ),
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): fields(
        parentRefs=items(_PEER), hostnames=items(TEXT), rules=items(fields(backendRefs=items(_PEER)))
    ),
    ("cert-manager.io/v1", "Certificate"): fields(
        ["issuerRef", "secretName"],
        secretName=TEXT,
        duration=TEXT,
        dnsNames=items(TEXT),
        issuerRef=fields(["name"], name=TEXT, kind=TEXT, group=TEXT),
    ),
}


def problems(found, kube_version):
    """The faults of an object, as lines; an unknown field is one."""
    spec = SPECS.get((found["apiVersion"], found["kind"]))
    if spec is None:
        return _lines(_native(kube_version, found["apiVersion"], found["kind"]), found)
    whole = fields(["apiVersion", "kind", "metadata", "spec"], apiVersion=TEXT, kind=TEXT, metadata=ANY, spec=spec)
    wrong = _lines(Draft202012Validator(whole), found)
    for part in (_metadata(found), *_native_parts(found)):
        wrong += problems(part, kube_version)
    return wrong


def _metadata(found):
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": found["metadata"]}


def _native_parts(found):
    """Templates and services within a custom object, as objects that Kubernetes knows."""
    if found["kind"] != "RayService":
        return
    spec = found["spec"]
    cluster = spec["rayClusterConfig"]
    yield {"apiVersion": "v1", "kind": "Service"} | spec["serveService"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield {"apiVersion": "v1", "kind": "PodTemplate", "template": group["template"]}
    options = cluster.get("autoscalerOptions", {})
    names = ("env", "envFrom", "volumeMounts", "resources", "securityContext")
    autoscaler = {"name": "autoscaler"} | {name: options[name] for name in names if name in options}
    password = cluster.get("gcsFaultToleranceOptions", {}).get("redisPassword", {})
    redis = {"name": "redis", "env": [{"name": "REDIS_PASSWORD"} | password]}
    yield {"apiVersion": "v1", "kind": "Pod", "spec": {"containers": [autoscaler, redis]}}


def _lines(validator, found):
    return [f"{found['kind']} {error.json_path}: {error.message}" for error in validator.iter_errors(found)]


@cache
def _definitions(kube_version):
    folder = files("kubernetes_validate") / "kubernetes-json-schema" / f"v{kube_version}-local-strict"
    return folder, Resource.from_contents(json.loads((folder / "_definitions.json").read_text())) @ Registry()


@cache
def _native(kube_version, api_version, kind):
    """The validator of a kind, as in `kubernetes-validate --strict`, which would read every definition anew."""
    folder, registry = _definitions(kube_version)
    group, _, version = api_version.rpartition("/")
    name = "-".join(filter(None, [kind.lower(), group.split(".")[0], version]))
    schema = json.loads((folder / f"{name}.json").read_text())
    return Draft202012Validator(schema, registry=Resource.from_contents(schema) @ registry)


@cache
def published():
    """(API version, kind) -> validator of a published definition, unknown fields refused."""
    if "CRDS" not in os.environ:
        pytest.skip("CRDS names no folder with published definitions")
    validators = {}
    for path in Path(os.environ["CRDS"]).glob("*.yaml"):
        crd = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)["spec"]
        for version in crd["versions"]:
            schema = _closed(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = ANY
            validators[f"{crd['group']}/{version['name']}", crd["names"]["kind"]] = Draft202012Validator(schema)
    return validators


def _closed(schema):
    """A structural schema as an API server with strict field validation takes it."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    closed = {k: v for k, v in schema.items() if k in ("type", "enum", "minimum", "maximum", "pattern", "required")}
    if "properties" in schema:
        closed["properties"] = {name: _closed(value) for name, value in schema["properties"].items()}
        closed["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    elif isinstance(schema.get("additionalProperties"), dict):
        closed["additionalProperties"] = _closed(schema["additionalProperties"])
    if "items" in schema:
        closed["items"] = _closed(schema["items"])
    return closed
