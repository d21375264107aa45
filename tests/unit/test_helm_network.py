"""The ways to the pods of a release: services, policies, budgets, monitors, secrets, ways in from outside."""

import re

import pytest
from helm_charts import SHAPES, Refused, container, rendered

KEYS = {"apiKeys": {"enabled": True, "content": "hashed"}}


def matches(selector, labels):
    return all(labels.get(key) == value for key, value in selector.items())


def chosen(objects, selector):
    """Roles of the pods that a selector chooses."""
    return {role for role, pod in objects.pods.items() if matches(selector, pod["metadata"]["labels"])}


def ports_of(objects, role):
    return {port["name"]: port["containerPort"] for port in container(objects.pods[role])["ports"]}


def opened(objects, role, *, outside=True):
    """Port names of a role that policies open, to others than the release's own pods; None stands for all."""
    found = set()
    for policy in objects.of("NetworkPolicy"):
        spec = policy["spec"]
        if role not in chosen(objects, spec["podSelector"]["matchLabels"]):
            continue
        for rule in spec["ingress"]:
            inside = "podSelector" in rule.get("from", [{}])[0] and "namespaceSelector" not in rule["from"][0]
            if inside != outside:
                found |= {port["port"] for port in rule.get("ports", [{"port": None}])}
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_the_service_has_the_ingress_pods_behind_it(shape):
    objects = rendered(shape)
    spec = objects.one("Service")["spec"]
    assert chosen(objects, spec["selector"]) == {"ingress"}
    grpc, http = spec["ports"]
    assert (grpc["appProtocol"], http["appProtocol"]) == ("kubernetes.io/h2c", "http")
    assert [ports_of(objects, "ingress")[port["targetPort"]] for port in (grpc, http)] == [9000, 8000]
    assert not matches(spec["selector"], objects.one("Pod")["metadata"]["labels"])


@pytest.mark.parametrize("shape", SHAPES)
def test_kuberay_finds_its_ports_and_its_own_labels(shape):
    """Its services take the head's ports named serve, serve-…; its head services select by its own name label."""
    objects = rendered(shape)
    assert {"serve": 8000, "serve-grpc": 9000}.items() <= ports_of(objects, "head").items()
    serve = {port["name"]: port for port in objects.one("RayService")["spec"]["serveService"]["spec"]["ports"]}
    assert serve["serve"]["port"] == 8000
    assert serve["serve-grpc"]["port"] == 9000
    assert serve["serve-grpc"]["appProtocol"] == "kubernetes.io/h2c"
    for pod in objects.pods.values():
        assert "app.kubernetes.io/name" not in pod["metadata"]["labels"]
        assert {port["name"]: port["containerPort"] for port in container(pod)["ports"]}["metrics"] == 8080


@pytest.mark.parametrize("shape", SHAPES)
def test_policies_close_all_but_what_is_served(shape):
    objects = rendered(shape)
    metrics = {"app-metrics", "metrics"}
    assert opened(objects, "ingress") == {"serve", "serve-grpc"} | metrics
    assert opened(objects, "head") == {"dashboard"} | metrics
    for role in {"attention", "experts"} & objects.pods.keys():
        assert opened(objects, role) == metrics
    for role in objects.pods:
        assert opened(objects, role, outside=False) == {None}
        assert opened(objects, role) <= set(ports_of(objects, role))
    for policy in objects.of("NetworkPolicy"):
        assert "Ingress" in policy["spec"]["policyTypes"]


def test_the_smoke_test_is_inside():
    objects = rendered("a2.7b")
    [internal] = [p for p in objects.of("NetworkPolicy") if p["metadata"]["name"].endswith("-internal")]
    labels = objects.one("Pod")["metadata"]["labels"]
    assert matches(internal["spec"]["podSelector"]["matchLabels"], labels)


def test_metrics_stay_inside_without_namespaces_that_scrape():
    assert opened(rendered("a2.7b", {"networkPolicy.metricsFrom": []}), "experts") == set()
    closed = rendered("a2.7b", {"metrics.enabled": False})
    assert opened(closed, "experts") == set()
    assert closed.serve_config["applications"][0]["args"]["metrics_host"] == "127.0.0.1"
    assert closed.of("PodMonitor") == []


def test_grpc_is_open_to_the_named_only():
    [policy] = [p for p in rendered("57b").of("NetworkPolicy") if p["metadata"]["name"].endswith("-grpc")]
    [rule] = policy["spec"]["ingress"]
    assert rule["from"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress-nginx"}}}]


def test_restricted_pods_call_one_another_names_and_what_is_said():
    [internal] = [p for p in rendered("cpu-experts").of("NetworkPolicy") if p["metadata"]["name"].endswith("-internal")]
    assert internal["spec"]["policyTypes"] == ["Ingress", "Egress"]
    inside, names, extra = internal["spec"]["egress"]
    assert inside["to"][0]["podSelector"] == internal["spec"]["podSelector"]
    assert {port["port"] for port in names["ports"]} == {53}
    assert extra == {"ports": [{"protocol": "TCP", "port": 443}]}


def test_without_http_its_port_is_closed_and_no_clients_port():
    objects = rendered("a2.7b", {"cluster.http_api": False})
    assert [port["name"] for port in objects.one("Service")["spec"]["ports"]] == ["serve-grpc"]
    assert "serve" not in opened(objects, "ingress")


def test_there_is_no_policy_where_none_is_wanted():
    objects = rendered("a2.7b", {"networkPolicy.enabled": False})
    assert objects.of("NetworkPolicy") == []


def test_budgets_choose_their_group_and_leave_all_pods_but_one():
    objects = rendered("57b")
    left = {}
    for budget in objects.of("PodDisruptionBudget"):
        [role] = chosen(objects, budget["spec"]["selector"]["matchLabels"])
        left[role] = budget["spec"]["minAvailable"]
        assert "maxUnavailable" not in budget["spec"]
    assert left == {"ingress": 1, "attention": 1, "experts": 1}
    [experts] = [
        b for b in rendered("cpu-experts").of("PodDisruptionBudget") if b["metadata"]["name"].endswith("experts")
    ]
    assert experts["spec"]["minAvailable"] == 3


def test_the_monitor_scrapes_both_ports_of_every_ray_pod():
    objects = rendered("57b")
    monitor = objects.one("PodMonitor")
    assert chosen(objects, monitor["spec"]["selector"]["matchLabels"]) == set(objects.pods)
    scraped = [endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]]
    assert scraped == ["app-metrics", "metrics"]
    for role in objects.pods:
        assert ports_of(objects, role)["app-metrics"] == 9464
    assert monitor["metadata"]["labels"]["release"] == "prometheus"


def test_a_cluster_is_one_job_that_the_rules_know_whatever_its_name():
    """The alerts look for jobs with moe-cluster in their names, and for the controller in each of them."""
    monitor = rendered("57b", {"fullnameOverride": "qwen"}).one("PodMonitor")
    for endpoint in monitor["spec"]["podMetricsEndpoints"]:
        [rule] = endpoint["relabelings"]
        assert rule == {"action": "replace", "targetLabel": "job", "replacement": "moe-cluster/serving/qwen"}


@pytest.mark.parametrize("shape", SHAPES)
def test_pods_name_secrets_and_hold_none(shape):
    objects = rendered(shape, KEYS)
    made = {found["metadata"]["name"] for found in objects.of("Secret")}
    assert made == {"demo-moe-cluster-api-keys"}
    for pod in (*objects.pods.values(), objects.one("Pod")):
        for found in (*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]):
            for variable in found["env"]:
                if re.search("TOKEN|KEY|SECRET|PASSWORD", variable["name"]):
                    assert "secretKeyRef" in variable["valueFrom"], variable
    [volume] = [v for v in objects.pods["ingress"]["spec"]["volumes"] if v["name"] == "api-keys"]
    assert volume["secret"]["secretName"] in made
    assert objects.one("Secret")["stringData"] == {"keys": "hashed"}


def test_existing_secrets_are_named_where_they_are_read():
    objects = rendered("57b")
    assert objects.of("Secret") == []
    assert objects.cluster["authOptions"] == {"mode": "token", "secretName": "ray-token"}
    password = objects.cluster["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]
    assert password == {"name": "redis", "key": "password"}
    [volume] = [v for v in objects.pods["ingress"]["spec"]["volumes"] if v["name"] == "api-keys"]
    assert volume["secret"]["secretName"] == "moe-cluster-keys"
    key = container(objects.one("Pod"))["env"][-1]["valueFrom"]["secretKeyRef"]
    assert key == {"name": "moe-cluster-smoke-test", "key": "api-key"}
    assert rendered("a2.7b").cluster["authOptions"] == {"mode": "token"}
    assert rendered("a2.7b", {"rayAuth.enabled": False}).cluster["authOptions"] == {"mode": "disabled"}


def test_the_ingresses_lead_to_the_service_with_the_certificates_secret():
    """ingress-nginx speaks one protocol for an Ingress: one is for gRPC, one of the same host for HTTP."""
    objects = rendered("57b")
    service = objects.one("Service")
    ports = {port["name"]: port["port"] for port in service["spec"]["ports"]}
    assert ports == {"serve-grpc": 9000, "serve": 8000}
    assert objects.one("Certificate")["spec"]["secretName"] == "demo-moe-cluster-tls"
    assert objects.one("Certificate")["spec"]["dnsNames"] == ["moe.example.com"]
    paths = {
        "demo-moe-cluster": ("GRPC", "serve-grpc", ["/moecluster.v1.InferenceService/", "/grpc.health.v1.Health/"]),
        "demo-moe-cluster-http": (None, "serve", ["/"]),
    }
    assert {one["metadata"]["name"] for one in objects.of("Ingress")} == paths.keys()
    for ingress in objects.of("Ingress"):
        protocol, port, wanted = paths[ingress["metadata"]["name"]]
        annotations = ingress["metadata"]["annotations"]
        assert annotations.get("nginx.ingress.kubernetes.io/backend-protocol") == protocol
        assert annotations["nginx.ingress.kubernetes.io/proxy-read-timeout"] == "3600"
        assert ingress["spec"]["tls"] == [{"hosts": ["moe.example.com"], "secretName": "demo-moe-cluster-tls"}]
        [rule] = ingress["spec"]["rules"]
        assert [path["path"] for path in rule["http"]["paths"]] == wanted
        backends = [path["backend"]["service"] for path in rule["http"]["paths"]]
        assert all(one == {"name": service["metadata"]["name"], "port": {"name": port}} for one in backends)


def test_where_there_is_no_http_api_no_ingress_and_no_route_leads_to_it():
    [ingress] = rendered("57b", {"cluster.http_api": False}).of("Ingress")
    assert ingress["metadata"]["name"] == "demo-moe-cluster"
    assert len(rendered("57b", {"ingress.http": {"enabled": False}}).of("Ingress")) == 1
    route = {"enabled": True, "parentRefs": [{"name": "public"}]}
    with pytest.raises(Refused, match="httpRoute needs the HTTP API"):
        rendered("a2.7b", {"httpRoute": route, "cluster.http_api": False})


def test_client_certificates_are_asked_for_by_the_ingress():
    changes = {
        "ingress": {"enabled": True, "host": "moe.example.com"},
        "tls": {"secretName": "moe-tls", "clientCertificates": True},
    }
    for ingress in rendered("a2.7b", changes).of("Ingress"):
        annotations = ingress["metadata"]["annotations"]
        assert annotations["nginx.ingress.kubernetes.io/auth-tls-secret"] == "serving/moe-tls"
        assert annotations["nginx.ingress.kubernetes.io/auth-tls-verify-client"] == "on"


def test_the_route_lets_inference_and_health_through():
    objects = rendered("cpu-experts")
    [rule] = objects.one("GRPCRoute")["spec"]["rules"]
    services = [match["method"]["service"] for match in rule["matches"]]
    assert services == ["moecluster.v1.InferenceService", "grpc.health.v1.Health"]
    assert rule["backendRefs"] == [{"name": objects.one("Service")["metadata"]["name"], "port": 9000}]


def test_the_route_of_http_leads_to_its_port():
    """Also where the API's host name is another one than gRPC's; the certificate has both."""
    route = {"enabled": True, "parentRefs": [{"name": "public", "namespace": "gateways"}], "hostnames": ["api.x.com"]}
    certificate = {"certManager": {"enabled": True, "issuerRef": {"name": "ca"}}}
    objects = rendered("cpu-experts", {"httpRoute": route, "tls": certificate})
    found = objects.one("HTTPRoute")["spec"]
    assert found["parentRefs"] == route["parentRefs"]
    assert found["rules"] == [{"backendRefs": [{"name": objects.one("Service")["metadata"]["name"], "port": 8000}]}]
    assert objects.one("Certificate")["spec"]["dnsNames"] == ["moe.example.com", "api.x.com"]


def test_extra_objects_are_templates():
    extra = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "{{ .Release.Name }}-more"}}
    objects = rendered("laptop", {"extraObjects": [extra]})
    assert objects.one("ConfigMap")["metadata"]["name"] == "demo-more"
