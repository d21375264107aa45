"""The PromQL of deploy/: every expression of the rules and the dashboards, with its labels. Knows no metric."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import promql_parser
import yaml

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
RULES = DEPLOY / "prometheus" / "rules.yaml"
GRAFANA_VALUES = {"$__rate_interval": "1m", "$job": ".*"}  # as Grafana would fill them in

Labels = frozenset[str]
TARGET = frozenset({"job", "instance"})  # labels of every scraped series
OWN = {"up": TARGET, "ALERTS": frozenset({"alertname", "alertstate", "severity", "job"})}  # Prometheus's


def rules() -> list[dict[str, Any]]:
    """The rules of all groups."""
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def alerts() -> list[dict[str, Any]]:
    return [rule for rule in rules() if "alert" in rule]


def panels() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every panel, with its place in words."""
    for path in sorted((DEPLOY / "grafana").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            yield f"{path.name}: {panel['title']}", panel


def expressions() -> dict[str, str]:
    """Every expression by its place in words, with Grafana's variables filled in."""
    found = {f"rules.yaml: {rule['record']}": rule["expr"] for rule in rules() if "record" in rule}
    found |= {f"rules.yaml: {alert['alert']} {alert['labels']['severity']}": alert["expr"] for alert in alerts()}
    for place, panel in panels():
        for target in panel["targets"]:
            found[f"{place} ({target['refId']})"] = filled_in(target["expr"])
    return found


def filled_in(expression: str) -> str:
    for variable, value in GRAFANA_VALUES.items():
        expression = expression.replace(variable, value)
    return expression


def series(metrics: Mapping[str, tuple[str, set[str]]]) -> dict[str, Labels]:
    """The labels of every series: those of `metrics` (type, labels) as Prometheus stores them, and the records'.

    Raises as `labels_of`.
    """
    known = dict(OWN)
    for name, (kind, labels) in metrics.items():
        if kind == "histogram":
            known |= {f"{name}_{part}": TARGET | labels for part in ("sum", "count")}
            known[f"{name}_bucket"] = TARGET | labels | {"le"}
        else:
            known[name] = TARGET | labels
    for rule in rules():
        if "record" in rule:
            known[rule["record"]] = labels_of(promql_parser.parse(rule["expr"]), known)
    return known


def check(expression: str, known: Mapping[str, Labels]) -> None:
    """Raises as `labels_of`, also for the labels that it matches by."""
    node = promql_parser.parse(expression)
    labels_of(node, known)
    for selector in selectors(node):
        unknown = {matcher.name for matcher in selector.matchers.matchers} - known[selector.name]
        assert not unknown, f"{selector}: no label {unknown}"


def selectors(node: Any) -> Iterator[Any]:
    """Every VectorSelector in it."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    for child in _children(node):
        yield from selectors(child)


def _children(node: Any) -> list[Any]:
    parts = [getattr(node, name, None) for name in ("lhs", "rhs", "expr", "vector_selector")]
    return [part for part in (*parts, *getattr(node, "args", ())) if part is not None]


def labels_of(node: Any, known: Mapping[str, Labels]) -> Labels:
    """The labels of an expression's results. known: those of each metric and record by name.

    Raises KeyError for an unknown name, and AssertionError for an unknown label.
    """
    if isinstance(node, promql_parser.VectorSelector):
        return known[node.name]
    if isinstance(node, promql_parser.AggregateExpr):
        return _aggregated(node, labels_of(node.expr, known))
    if isinstance(node, promql_parser.BinaryExpr):
        return _joined(node, labels_of(node.lhs, known), labels_of(node.rhs, known))
    inner = frozenset().union(*(labels_of(child, known) for child in _children(node)))
    if isinstance(node, promql_parser.Call) and node.func.name == "histogram_quantile":
        assert "le" in inner, f"{node.prettify()}: its buckets were summed up"
        return inner - {"le"}
    return inner


def _aggregated(node: Any, inner: Labels) -> Labels:
    if node.modifier is None:
        return frozenset()
    named = frozenset(node.modifier.labels)
    assert named <= inner, f"{node.prettify()}: no label {set(named - inner)}"
    return named if node.modifier.type == promql_parser.AggModifierType.By else inner - named


def _joined(node: Any, left: Labels, right: Labels) -> Labels:
    if str(node.op) == "or":
        return left | right
    matching = node.modifier.matching if node.modifier else None
    if matching is not None:
        named = frozenset(matching.labels)
        assert named <= left & right, f"{node.prettify()}: no label {set(named - left & right)} on both sides"
    elif left and right:  # neither is a number
        assert left == right, f"{node.prettify()}: {set(left ^ right)} on one side only"
    return left or right
