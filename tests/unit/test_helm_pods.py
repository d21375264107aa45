"""The pods of a release: probes, ends, security, resources, and what is mounted."""

import math

import pytest
from helm_charts import SHAPES, container, rendered, values_of

from cluster.runtime.bounds import RAY_BOUNDS
from cluster.runtime.front.haproxy import SERVE_ENVIRONMENT

ROLES = ("head", "ingress", "attention", "experts")
PODS = [(shape, role) for shape in SHAPES for role in ROLES if role != "experts" or shape != "dense"]
BYTES = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "m": 1e-3}


def amount(quantity):
    """A Kubernetes quantity as a number."""
    text = str(quantity)
    unit = next((unit for unit in BYTES if text.endswith(unit)), "")
    return float(text.removesuffix(unit)) * BYTES.get(unit, 1)


def mounts(found):
    return {mount["mountPath"]: mount for mount in found["volumeMounts"]}


@pytest.mark.parametrize("shape", SHAPES)
def test_an_ingress_pod_is_ready_when_its_grpc_says_so(shape):
    found = container(rendered(shape).pods["ingress"])
    assert found["readinessProbe"]["grpc"] == {"port": 9000}
    assert {"name": "serve-grpc", "containerPort": 9000} in found["ports"]


@pytest.mark.parametrize("shape", ["a2.7b", "dense"])
def test_a_dense_model_has_no_pods_for_experts(shape):
    release = rendered(shape, {"cluster.expert_shards": 0, "podDisruptionBudgets.enabled": True})
    assert set(release.pods) == {"head", "ingress", "attention"}
    budgets = [budget["metadata"]["name"] for budget in release.of("PodDisruptionBudget")]
    assert len(budgets) == 2
    assert not any(name.endswith("-experts") for name in budgets)
    assert release.notes == "" or "no expert shards: the model is dense" in release.notes


@pytest.mark.parametrize(("shape", "role"), PODS)
def test_a_long_load_restarts_nothing(shape, role):
    """The probes that restart a container ask Ray's node, which answers while a model is read."""
    found = container(rendered(shape).pods[role])
    assert (
        found["startupProbe"]["httpGet"] == found["livenessProbe"]["httpGet"] == {"path": "/api/healthz", "port": 52365}
    )
    assert "grpc" not in found["startupProbe"] | found["livenessProbe"]


def test_the_startup_probe_waits_as_long_as_said():
    probe = container(rendered("a2.7b", {"probes.startup.timeoutSeconds": 302}).pods["head"])["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] == 305


def ends(pod):
    """Seconds from a pod's deletion: to SIGTERM, to the end of Ray's drain, to SIGKILL."""
    [command, seconds] = container(pod)["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    [drain] = [v["value"] for v in container(pod)["env"] if v["name"] == "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]
    return int(seconds), int(seconds) + int(drain), pod["spec"]["terminationGracePeriodSeconds"]


@pytest.mark.parametrize(("shape", "role"), PODS)
def test_a_pod_is_killed_after_its_node_has_drained(shape, role):
    """60 s for what moves, then drain_timeout_s for what cannot, which Serve lets begin so long before Ray's deadline.
    Then 30 s for Ray's processes."""
    objects = rendered(shape)
    drain_s = objects.serve_config["applications"][0]["args"]["drain_timeout_s"]
    termed, drained, killed = ends(objects.pods[role])
    assert drained == 5 + 60 + math.ceil(drain_s)
    assert termed == (drained if role == "head" else 5)
    assert killed == drained + 30


def test_a_pods_end_follows_its_values():
    times = {"endpointSeconds": 1, "moveSeconds": 200, "stopSeconds": 3}
    changes = {f"termination.{name}": seconds for name, seconds in times.items()} | {"cluster.drain_timeout_s": 20.5}
    pods = rendered("a2.7b", changes).pods
    assert ends(pods["experts"]) == (1, 222, 225)
    assert ends(pods["head"]) == (222, 222, 225)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_container_is_confined(shape):
    objects = rendered(shape)
    for pod in (*objects.pods.values(), objects.one("Pod")):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for found in (*spec.get("initContainers", ()), *spec["containers"]):
            context = found["securityContext"]
            assert context["readOnlyRootFilesystem"]
            assert not context["allowPrivilegeEscalation"]
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert mounts(found)["/tmp"]["name"] == "tmp"
            assert {"name": "HOME", "value": "/tmp"} in found["env"]


@pytest.mark.parametrize(("shape", "role"), PODS)
def test_the_object_store_fits_into_shared_memory(shape, role):
    objects = rendered(shape)
    pod = objects.pods[role]
    group = objects.cluster["headGroupSpec"] if role == "head" else objects.groups[role]
    [volume] = [v for v in pod["spec"]["volumes"] if v["name"] == mounts(container(pod))["/dev/shm"]["name"]]
    assert volume["emptyDir"]["medium"] == "Memory"
    size = amount(volume["emptyDir"]["sizeLimit"])
    assert int(group["rayStartParams"]["object-store-memory"]) < size
    assert size < amount(container(pod)["resources"]["limits"]["memory"])


@pytest.mark.parametrize(("shape", "role"), PODS)
def test_what_is_mounted_is_there_and_the_model_read_only_unless_it_is_the_hubs_cache(shape, role):
    keys = {"apiKeys": {"enabled": True, "existingSecret": "keys"}, "adminKeys": {"existingSecret": "admins"}}
    pod = rendered(shape, keys).pods[role]
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
    for found in (*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]):
        assert {mount["name"] for mount in found["volumeMounts"]} <= volumes
    model = [mount for mount in container(pod)["volumeMounts"] if mount["name"] == "model"]
    source = values_of(shape).get("model", {}).get("source", {})
    assert [mount["readOnly"] for mount in model] == ["huggingFace" not in source] * bool(source)
    for kind in ("api-keys", "admin-keys"):
        assert (f"/etc/moe-cluster/{kind}" in mounts(container(pod))) == (role == "ingress")


@pytest.mark.parametrize("shape", SHAPES)
def test_gpus_are_asked_for_and_kept_from_others(shape):
    """A pod without GPUs sees none, a group has what its processes take."""
    objects = rendered(shape)
    args = objects.serve_config["applications"][0]["args"]
    gpus_of = {}
    for role, pod in objects.pods.items():
        limits = container(pod)["resources"].get("limits", {})
        gpus = int(limits.get("nvidia.com/gpu", 0))
        hidden = {"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"} in container(pod)["env"]
        assert hidden == (gpus == 0)
        if role != "head":
            assert objects.groups[role]["resources"]["GPU"] == str(gpus)
            gpus_of[role] = gpus * objects.groups[role]["maxReplicas"]
    replicas = args.get("max_attention_replicas") or args["attention_replicas"]
    assert gpus_of["attention"] >= replicas * args["gpus_per_attention_replica"]
    assert gpus_of.get("experts", 0) >= args["expert_shards"] * args["gpus_per_expert_shard"]
    assert gpus_of["ingress"] == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_processes_find_the_cpus_that_they_ask_for(shape):
    """As KubeRay counts: the limit, else the request, rounded up."""
    objects = rendered(shape)
    args = objects.serve_config["applications"][0]["args"]

    def cpus(role):
        resources = container(objects.pods[role])["resources"]
        cpu = resources.get("limits", {}).get("cpu") or resources["requests"]["cpu"]
        return math.ceil(amount(cpu)) * objects.groups[role]["maxReplicas"]

    replicas = args.get("max_attention_replicas") or args["attention_replicas"]
    assert cpus("attention") >= replicas * args.get("cpus_per_attention_replica", 1)
    if args["expert_shards"]:
        assert cpus("experts") >= args["expert_shards"] * args.get("cpus_per_expert_shard", 1)
    assert cpus("ingress") >= 0.1 * args["ingress_replicas"]


@pytest.mark.parametrize(
    ("shape", "dense", "routed", "copies"),
    [("a2.7b", 3.72e9, 24.9e9, 1), ("57b", 16.2e9, 98.7e9, 2), ("dense", 15.23e9, 0, 1)],
)
def test_weights_fit_into_the_named_gpus(shape, dense, routed, copies):
    """The README's figures of `moe-cluster plan`, against 24 and 80 GB; 2 GB are left for a step's tensors."""
    gpu = {"a2.7b": 24e9, "57b": 80e9, "dense": 24e9}[shape]
    args = values_of(shape)["cluster"]
    assert dense + args["kv_cache_bytes"] + 2e9 < gpu
    assert copies == args.get("min_copies", 1)
    assert not args["expert_shards"] or routed * copies / args["expert_shards"] + 2e9 < gpu


def test_experts_on_cpus_have_memory_for_their_slice():
    objects = rendered("cpu-experts")
    args = objects.serve_config["applications"][0]["args"]
    slices = 24.9e9 / args["expert_shards"]
    assert amount(container(objects.pods["experts"])["resources"]["limits"]["memory"]) > 2 * slices
    assert args["gpus_per_expert_shard"] == 0
    assert args["gpus_per_attention_replica"] == 1


def test_placement_reaches_the_pods():
    spec = rendered("57b").pods["experts"]["spec"]
    assert spec["runtimeClassName"] == "nvidia"
    assert spec["priorityClassName"] == "serving"
    assert spec["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    assert "podAntiAffinity" in spec["affinity"]
    assert rendered("57b").pods["ingress"]["spec"]["topologySpreadConstraints"][0]["maxSkew"] == 1
    assert rendered("a2.7b").pods["experts"]["spec"]["tolerations"][0]["key"] == "nvidia.com/gpu"


def test_a_new_chart_version_alone_starts_no_second_cluster():
    """KubeRay starts one for any change in a pod's template: no version stands there but the image's."""
    for pod in rendered("a2.7b").pods.values():
        assert not {"helm.sh/chart", "app.kubernetes.io/version"} & set(pod["metadata"]["labels"])


def test_haproxy_is_told_to_every_ray_container():
    for role in ROLES:
        on, off = (container(rendered(shape).pods[role])["env"] for shape in ("a2.7b", "cpu-experts"))
        environment = {variable["name"]: variable.get("value") for variable in on}
        assert {name: environment.get(name) for name in SERVE_ENVIRONMENT if not name.endswith("_S")} == {
            name: value for name, value in SERVE_ENVIRONMENT.items() if not name.endswith("_S")
        }
        assert {name for name in SERVE_ENVIRONMENT if name.endswith("_S")} <= environment.keys()
        assert {"name": "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "value": "10"} in on
        assert {"name": "RAY_SERVE_HAPROXY_BINARY_PATH", "value": "/opt/venv/bin/moe-cluster-haproxy"} in on
        assert not any("PROXY" in variable["name"] for variable in off)
    environment = container(rendered("a2.7b", {"haproxy.program": ""}).pods["head"])["env"]
    assert not any("BINARY" in variable["name"] for variable in environment)


def test_every_ray_container_is_told_what_bounds_a_ray_that_runs_for_weeks():
    for shape in ("a2.7b", "cpu-experts"):
        for pod in rendered(shape).pods.values():
            environment = {variable["name"]: variable.get("value") for variable in container(pod)["env"]}
            assert {name: environment.get(name) for name in RAY_BOUNDS} == RAY_BOUNDS


def test_only_the_autoscalers_pod_gets_a_token():
    for shape in SHAPES:
        objects = rendered(shape)
        assert objects.one("ServiceAccount")["automountServiceAccountToken"] is False
        given = {role for role, pod in objects.pods.items() if pod["spec"]["automountServiceAccountToken"]}
        assert given == ({"head"} if shape == "cpu-experts" else set())
        assert {pod["spec"]["serviceAccountName"] for pod in objects.pods.values()} == {"demo-moe-cluster"}
