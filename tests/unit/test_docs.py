"""The documents say what the code does."""

import inspect
import re
from dataclasses import MISSING, fields
from pathlib import Path

import config_docs
import pytest
import yaml

from cluster import LLM, cli, metrics
from cluster.config import DEFAULTS, ClusterConfig
from cluster.config.options import doc_of
from cluster.metrics import CollectorRegistry

ROOT = Path(__file__).resolve().parents[2]
CONFIGURATION, COMMANDS, METRICS = (
    (ROOT / "docs" / f"{name}.md").read_text() for name in ("configuration", "commands", "metrics")
)


def test_the_table_of_arguments_is_made_from_the_fields_help_texts():
    """`python tests/config_docs.py` makes it."""
    assert config_docs.with_table(CONFIGURATION) == CONFIGURATION
    rows = re.findall(r"^\| `(\w+)` \| (`.*?`|required) \| \S", CONFIGURATION, flags=re.MULTILINE)
    assert [name for name, _ in rows] == list(dict.fromkeys(name for name, _ in rows))
    assert {name for name, _ in rows} == {f.name for f in fields(ClusterConfig)}
    assert dict(rows)["max_num_seqs"] == "`64`"


def test_the_charts_values_for_the_cluster_have_the_fields_help_texts():
    """The chart may say more of one, in place of what its field says after the first semicolon."""
    docs = {f.name: doc_of(f) for f in fields(ClusterConfig)}
    values = (ROOT / "helm" / "moe-cluster" / "values.yaml").read_text()
    [block] = re.findall(r"^cluster:\n((?:  .*\n)+)", values, flags=re.MULTILINE)
    meanings = re.findall(r"  # -- (.+)\n  (\w+):", block)
    assert len(meanings) == len(yaml.safe_load(block)) >= 6
    for text, name in meanings:
        begin = docs[name].partition(";")[0]
        assert text.startswith(begin[0].upper() + begin[1:]), name


def test_the_options_of_serve_have_the_fields_help_texts_and_defaults():
    """Two defaults are the command line's own: a machine's cores are divided by its processes."""
    serve = cli._parser()._subparsers._group_actions[0].choices["serve"]
    options = {action.dest: action for action in serve._actions}
    shared = [f for f in fields(ClusterConfig) if f.name in options and f.default is not MISSING]
    assert len(shared) > 20
    for f in shared:
        assert options[f.name].help.startswith(doc_of(f)), f.name
        if not f.name.startswith("cpus_per_"):
            assert options[f.name].default == f.default, f.name


def test_an_offline_llm_has_the_clusters_defaults():
    """Two differ: one shard, in the caller's process."""
    given = {name: p.default for name, p in inspect.signature(LLM).parameters.items() if p.kind is p.KEYWORD_ONLY}
    shared = given.keys() & {f.name for f in fields(ClusterConfig)}
    assert given.keys() - shared == {"num_expert_shards"}
    different = {name for name in shared if given[name] != DEFAULTS[name]}
    assert different == {"transport"}


def test_every_field_has_a_help_text_without_a_full_stop():
    for f in fields(ClusterConfig):
        assert doc_of(f), f.name
        assert not doc_of(f).endswith((".", ";")), f.name


def test_every_command_is_documented():
    commands = re.findall(r"^    (\w+) +\S", cli._parser().format_help(), flags=re.MULTILINE)
    assert len(commands) >= 6
    assert [name for name in commands if f"`moe-cluster {name}" not in COMMANDS] == []


def test_every_documented_metric_exists():
    registry = CollectorRegistry()
    metrics.IngressMetrics(registry)
    metrics.EngineMetrics(registry, "r")
    dispatch = metrics.DispatchMetrics(registry, "r")
    dispatch.sent(0, 1, 1)
    dispatch.rerouted(0, 1)
    metrics.ShardMetrics(registry, 0)
    metrics.ControllerMetrics(registry)
    metrics.ResponseStoreMetrics(registry)
    known = {family.name for family in registry.collect()}
    named = {name.removesuffix("_total") for name in re.findall(r"`(moecluster_\w+)", METRICS)}
    assert len(named) > 10
    assert named - known == set()


DOCS = sorted(str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")))


def anchors(path: Path) -> set[str]:
    """The names that a link may give after `#`: of each heading its small letters, without marks, `-` for a space."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCS)
def test_links_lead_somewhere(name):
    here = ROOT / name
    for link in re.findall(r"\]\((?!http)(\S+?)\)", here.read_text()):
        file, _, anchor = link.partition("#")
        target = here.parent / file if file else here
        assert target.exists(), f"{link}: no such file"
        assert not anchor or target.suffix != ".md" or anchor in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("name", DOCS)
def test_named_files_of_the_package_exist(name):
    """`runtime/front/haproxy.py` is a path below cluster/."""
    named = set(re.findall(r"`((?:[a-z_]+/)+[a-z_]*(?:\.py)?)`", (ROOT / name).read_text()))
    known = {path.split("/")[0] for path in named} & {path.name for path in (ROOT / "cluster").iterdir()}
    assert [path for path in named if path.split("/")[0] in known and not (ROOT / "cluster" / path).exists()] == []
