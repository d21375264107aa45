"""The documents say what the code does."""

import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from cluster import cli, metrics
from cluster.config import ClusterConfig
from cluster.metrics import CollectorRegistry

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_the_configuration_table_has_every_argument_and_its_default():
    rows = re.findall(r"^\| `(\w+)` \| (?:`(.*?)`|(required)) \|", README, flags=re.MULTILINE)
    written = {name: required or default for name, default, required in rows}
    expected = {
        f.name: "required" if f.default is MISSING else repr(f.default).replace("'", '"') for f in fields(ClusterConfig)
    }
    assert written == expected


def test_every_command_is_in_the_readme():
    commands = re.findall(r"^    (\w+) +\S", cli._parser().format_help(), flags=re.MULTILINE)
    assert len(commands) >= 6
    assert [name for name in commands if f"`moe-cluster {name}" not in README] == []


def test_every_metric_in_the_readme_exists():
    registry = CollectorRegistry()
    metrics.IngressMetrics(registry)
    metrics.EngineMetrics(registry, "r")
    dispatch = metrics.DispatchMetrics(registry, "r")
    dispatch.sent(0, 1, 1)
    dispatch.rerouted(0, 1)
    metrics.ShardMetrics(registry, 0)
    metrics.ControllerMetrics(registry)
    known = {family.name for family in registry.collect()}
    named = {name.removesuffix("_total") for name in re.findall(r"`(moecluster_\w+)", README)}
    assert len(named) > 10
    assert named - known == set()


@pytest.mark.parametrize("name", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "BENCHMARKS.md", "SECURITY.md"])
def test_links_lead_somewhere(name):
    links = re.findall(r"\]\((?!http)([^)#]+)", (ROOT / name).read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []
