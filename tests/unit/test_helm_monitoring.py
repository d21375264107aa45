"""Rules and dashboards reach the cluster as the files in deploy/ have them."""

import json
import re
import shlex
import shutil

import pytest
import yaml
from helm_charts import CHART, ROOT, Objects, any_helm, values_of

ON = {
    "metrics.prometheusRule": {"enabled": True, "labels": {"release": "prometheus"}},
    "metrics.dashboards": {"enabled": True, "labels": {"grafana_dashboard": "1"}},
}
RULES = """\
# A comment that stays behind.
groups:
  - name: shards
    rules:
      - alert: ShardsMissing
        expr: moecluster_controller_up_shards < moecluster_controller_wanted_shards
        for: 1m
        annotations: {summary: "{{ $value }} shards of {{ $labels.job }}"}
"""
DASHBOARD = {"title": "Overview", "panels": [{"legendFormat": "{{shard_id}}"}]}


@pytest.fixture
def chart(tmp_path):
    """A copy of the chart with empty folders in the places of its links."""
    copy = tmp_path / "moe-cluster"
    shutil.copytree(CHART, copy, ignore=shutil.ignore_patterns("files"))
    for folder in ("prometheus", "grafana"):
        (copy / "files" / folder).mkdir(parents=True)
    return copy


def objects_of(chart):
    return Objects(any_helm().render(values_of("a2.7b", ON), chart=chart))


def test_rules_and_dashboards_are_passed_on_word_for_word(chart):
    """Both have templates of their own in double braces, which Helm leaves alone."""
    (chart / "files" / "prometheus" / "rules.yaml").write_text(RULES)
    (chart / "files" / "prometheus" / "alertmanager.yaml").write_text("route: {}\n")
    (chart / "files" / "grafana" / "overview.json").write_text(json.dumps(DASHBOARD, indent=2))
    objects = objects_of(chart)
    assert objects.one("PrometheusRule")["spec"] == yaml.safe_load(RULES)
    assert objects.one("PrometheusRule")["metadata"]["labels"]["release"] == "prometheus"
    dashboard = objects.one("ConfigMap")
    assert dashboard["metadata"]["name"] == "demo-moe-cluster-dashboard-overview"
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(dashboard["data"]["moe-cluster-overview.json"]) == DASHBOARD


def test_without_files_there_are_no_such_objects_and_the_notes_say_so(chart):
    objects = objects_of(chart)
    assert objects.of("PrometheusRule") == objects.of("ConfigMap") == []
    assert "no alert rules" in objects.notes


def test_the_charts_folders_are_those_of_deploy():
    for folder in ("prometheus", "grafana"):
        assert (CHART / "files" / folder).resolve() == ROOT / "deploy" / folder


def test_what_deploy_has_is_rendered():
    objects = Objects(any_helm().render(values_of("a2.7b", ON)))
    rules = ROOT / "deploy" / "prometheus" / "rules.yaml"
    assert len(objects.of("PrometheusRule")) == rules.exists()
    assert len(objects.of("ConfigMap")) == len(list((ROOT / "deploy" / "grafana").glob("*.json")))


def test_the_notes_say_what_to_do_next():
    notes = Objects(any_helm().render(values_of("57b"))).notes
    for text in ("kubectl -n serving wait", "helm -n serving test demo", "demo-moe-cluster.serving:9000", "with TLS"):
        assert text in notes
    assert "Everybody who reaches the port" not in notes
    assert "-H 'authorization: Bearer KEY'" in notes
    open_to_all = Objects(any_helm().render(values_of("laptop", {"networkPolicy.enabled": False}))).notes
    assert "Everybody who reaches the port" in open_to_all
    assert "WITHOUT A NETWORK POLICY" in open_to_all


def test_the_notes_have_a_call_with_curl_that_the_http_api_takes():
    """Its path, its header and its body; the port is forwarded from the service's."""
    from cluster.serving.openai.chat_schema import ChatRequest

    notes = Objects(any_helm().render({})).notes
    [command] = re.findall(r"curl (?:.*\\\n)*.*", notes)
    words = shlex.split(command)
    assert words[1] == "http://127.0.0.1:8000/v1/chat/completions"
    assert words[words.index("-H") + 1] == "content-type: application/json"
    assert ChatRequest.model_validate_json(words[words.index("-d") + 1]).messages
    assert "port-forward service/demo-moe-cluster 9000:9000 8000:8000\n" in notes
    without = Objects(any_helm().render({"cluster": {"http_api": False}})).notes
    assert "curl" not in without
    assert "port-forward service/demo-moe-cluster 9000:9000\n" in without
