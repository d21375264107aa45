"""Rules and dashboards agree with the metrics and with one another; with promtool its own tests run, too."""

import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import promql_parser
import pytest
import yaml
from prometheus_client import CollectorRegistry
from promql import (
    DEPLOY,
    GRAFANA_VALUES,
    RULES,
    alerts,
    check,
    expressions,
    filled_in,
    labels_of,
    panels,
    rules,
    selectors,
    series,
)
from test_metrics import METRICS

from cluster.metrics import (
    ControllerMetrics,
    DispatchMetrics,
    EngineMetrics,
    IngressMetrics,
    ResponseStoreMetrics,
    ShardMetrics,
)

EXPRESSIONS = expressions()


@pytest.fixture(scope="module")
def known():
    return series(METRICS)


@pytest.mark.parametrize("place", EXPRESSIONS)
def test_an_expression_asks_for_metrics_and_labels_that_exist(known, place):
    check(EXPRESSIONS[place], known)


@pytest.fixture(scope="module")
def label_values():
    """(metric, label) -> its values, of those that the code fixes: buckets, outcomes, reasons, phases, copies."""
    registry = CollectorRegistry()
    IngressMetrics(registry)
    EngineMetrics(registry, "r").finished("stop")
    dispatch, controller = DispatchMetrics(registry, "r"), ControllerMetrics(registry)
    dispatch.returned(0, 0.1, 1)
    ShardMetrics(registry, 0)
    ResponseStoreMetrics(registry)
    for outcome in ("done", "failed"):
        controller.changed("rebalance", outcome, 1)
    values: dict[tuple[str, str], set[str]] = {}
    for family in registry.collect():
        for sample in family.samples:
            for label, value in sample.labels.items():
                values.setdefault((sample.name, label), set()).add(value)
    return values


def test_a_matcher_matches_a_value_that_the_code_gives(label_values):
    """Else an alert never fires: le="0.3" where there is no such bucket, an outcome that is spelled otherwise."""
    checked = 0
    for place, expression in EXPRESSIONS.items():
        for selector in selectors(promql_parser.parse(expression)):
            for matcher in selector.matchers.matchers:
                values = label_values.get((selector.name, matcher.name))
                if values is None:
                    continue
                for wanted in re.sub(r"^\(\?i:(.*)\)$", r"\1", matcher.value).split("|"):
                    assert wanted in values, f"{place}: {matcher.name} is one of {sorted(values)}"
                    checked += 1
    assert checked > 15


def test_every_alert_says_how_bad_what_and_where_to_read_on(known):
    for alert in alerts():
        texts = alert["annotations"]
        assert alert["labels"]["severity"] in ("critical", "warning")
        assert texts.keys() == {"summary", "description", "runbook_url"}
        assert "$value" in texts["description"], alert["alert"]
        assert texts["runbook_url"] == f"docs/runbook.md#{alert['alert'].lower()}"
        named = set(re.findall(r"\$labels\.(\w+)", texts["description"]))
        assert named <= labels_of(promql_parser.parse(alert["expr"]), known), alert["alert"]


def test_records_are_named_by_their_labels(known):
    for rule in rules():
        if "record" in rule:
            short = {"job": "job", "outcome": "outcome", "replica": "replica", "shard": "shard_id"}
            named = {short[part] for part in rule["record"].split(":")[0].split("_")}
            assert named == known[rule["record"]], rule["record"]


def test_every_record_is_used():
    used = {
        selector.name for expression in EXPRESSIONS.values() for selector in selectors(promql_parser.parse(expression))
    }
    assert {rule["record"] for rule in rules() if "record" in rule} - used == set()


def test_every_metric_is_on_a_dashboard():
    shown = {
        re.sub(r"_(bucket|sum|count)$", "", selector.name)
        for _, panel in panels()
        for target in panel["targets"]
        for selector in selectors(promql_parser.parse(filled_in(target["expr"])))
    }
    assert METRICS.keys() - shown == set()


def test_every_alert_has_a_case_that_fires_and_one_that_does_not():
    fires: dict[str, set[bool]] = {}
    for test in yaml.safe_load((DEPLOY / "prometheus" / "rules_test.yaml").read_text())["tests"]:
        for case in test.get("promql_expr_test", ()):
            [name] = re.findall(r'alertname="(\w+)"', case["expr"])
            for sample in case["exp_samples"]:
                [severity] = re.findall(r'severity="(\w+)"', sample["labels"])
                fires.setdefault(f"{name} {severity}", set()).add(True)
            if not case["exp_samples"]:
                fires.setdefault(name, set()).add(False)
    wanted = {f"{alert['alert']} {alert['labels']['severity']}" for alert in alerts()}
    assert wanted - {name for name, cases in fires.items() if True in cases} == set()
    assert {alert["alert"] for alert in alerts()} - {name for name, cases in fires.items() if False in cases} == set()


def test_the_dashboards_are_what_their_program_writes():
    written = {path.name: path.read_text() for path in (DEPLOY / "grafana").glob("*.json")}
    assert runpy.run_path(str(DEPLOY / "grafana" / "build.py"))["dashboards"]() == written


def test_every_panel_says_its_unit_and_what_it_is_for(known):
    for place, panel in panels():
        assert panel["description"].endswith("."), place
        assert panel["fieldConfig"]["defaults"]["unit"], place
        assert panel["datasource"]["uid"] == "${datasource}", place
        for target in panel["targets"]:
            assert "$job" in target["expr"], f"{place}: mixes the clusters of one Prometheus"
            legend = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert legend <= labels_of(promql_parser.parse(filled_in(target["expr"])), known), place
            unknown = re.findall(r"\$\w+", target["expr"])
            assert set(unknown) <= GRAFANA_VALUES.keys(), place


def test_panels_stand_side_by_side():
    places: dict[str, set[tuple[int, int]]] = {}
    for place, panel in panels():
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        taken = places.setdefault(place.split(":")[0], set())
        assert not cells & taken, place
        assert max(x for x, _ in cells) < 24, place
        taken |= cells


def tool(name: str) -> str:
    found = os.environ.get(name.upper()) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@pytest.mark.parametrize(
    "arguments",
    [("check", "rules", RULES), ("check", "config", RULES.with_name("prometheus.yaml")),
     ("test", "rules", RULES.with_name("rules_test.yaml"))],
    ids=lambda arguments: " ".join(map(str, arguments[:2])),
)  # fmt: skip
def test_promtool_agrees(arguments: tuple[str | Path, ...]):
    done = subprocess.run([tool("promtool"), *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
