"""The examples of the documents that cannot run in a test, why, and how each is checked in place of that.

A command that is in no row of the table is run.
"""

import json
import re
import shlex
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml
from documents import ROOT, Example, examples
from helm_charts import Objects, any_helm

from cluster import cli


@dataclass(frozen=True)
class NotRun:
    """pattern: of the whole command. check: of one command, raises; or the path::name of the test that does it."""

    pattern: str
    why: str
    check: Callable[[Example], object] | str


def find(example: Example) -> NotRun | None:
    """The row of a command; None for one that is run."""
    return next((row for row in TABLE if re.fullmatch(row.pattern, example.text, re.DOTALL)), None)


def _continuous_integration_does(example: Example) -> None:
    """CI's script installs into a new environment by the same words."""
    script = (ROOT / ".ci" / "run").read_text()
    words = [word for word in shlex.split(example.text) if word not in ("pip", ".venv") and "python" not in word]
    assert all(word in script for word in words if word != ".venv/bin/activate"), example.text


def is_parsed(example: Example) -> None:
    """By the command line's parser. A word in capitals stands for a value."""
    words = [re.sub(r"^[A-Z_]+$", "1", word) for word in shlex.split(example.text) if word != "…"]
    while "=" in words[0]:
        del words[0]
    cli._parser().parse_args(words[1:])


def _extra_is_there(example: Example) -> None:
    """The tests' own extra has it, too."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    [extra] = re.findall(r"moe-cluster\[(\w+)\]", example.text)
    assert extra in extras
    assert any(extra in re.findall(r"\w+", one.partition("[")[2]) for one in extras["test"])


def _script_is_there(example: Example) -> None:
    [script] = [word for word in shlex.split(example.text) if word.endswith(".py")]
    assert (ROOT / script).is_file()


def _chart_renders(example: Example) -> None:
    """With the values files of the command; a file of the user's is each of the values that its README shows."""
    words = shlex.split(example.text)
    assert words[:4] == ["helm", "install", "moe", "helm/moe-cluster"], "helm install moe helm/moe-cluster …"
    assert set(words[4::2]) <= {"-f"}, "only -f is checked"
    files = words[5::2]
    given = [yaml.safe_load((ROOT / file).read_text()) for file in files if file != "my-values.yaml"]
    shown = [yaml.safe_load(one.text) for one in examples("helm/moe-cluster/README.md") if one.language == "yaml"]
    for mine in [{"service": {"type": "LoadBalancer"}}] if given else shown:
        values: dict[str, object] = {}
        for each in (*given, mine):
            values = _merged(values, each)
        assert any_helm().lint(values) == []
        assert any_helm().render(values, name=words[2])


def _merged(values: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """As Helm joins files of values: maps are merged, anything else is replaced."""
    inner = {key: _merged(values[key], over[key]) for key in values.keys() & over.keys() if isinstance(over[key], dict)}
    return values | over | inner


def _release() -> Objects:
    return Objects(any_helm().render({}, name="moe"))


def _object_is_in_the_release(example: Example) -> None:
    """Or is a Secret that an example of values names."""
    if " create secret " in example.text:
        values = [yaml.safe_load(one.text) for one in examples(example.page) if one.language == "yaml"]
        names = {one["apiKeys"]["existingSecret"] for one in values if "apiKeys" in one}
        assert shlex.split(example.text)[4] in names
        return
    kinds = {"rayservice": "RayService", "service": "Service"}
    [(kind, name)] = re.findall(r"\b(rayservice|service)/([a-z-]+)", example.text)
    assert [one for one in _release().all if one["kind"] == kinds[kind] and one["metadata"]["name"] == name]


def _release_has_a_test(example: Example) -> None:
    hooks = [one["metadata"].get("annotations", {}).get("helm.sh/hook") for one in _release().all]
    assert "test" in hooks


def _image_is_the_charts(example: Example) -> None:
    """The file and its target exist, and the chart's pods ask for the image under this name."""
    words = shlex.split(example.text)
    options = dict(zip(words[2:-1:2], words[3:-1:2], strict=True))
    assert f" AS {options['--target']}\n" in (ROOT / options["-f"]).read_text()
    [head] = _release().one("RayService")["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert head["image"] == options["-t"]


def _ray_takes_the_options(example: Example) -> None:
    from ray.scripts.scripts import start

    start.make_context("start", shlex.split(example.text)[2:])


def _serve_takes_the_file(example: Example) -> None:
    from ray.serve.schema import ServeDeploySchema
    from ray.serve.scripts import deploy

    given = deploy.make_context("deploy", shlex.split(example.text)[2:]).params["config_or_import_path"]
    schema = ServeDeploySchema.model_validate(yaml.safe_load((ROOT / given).read_text()))
    assert [one.import_path for one in schema.applications] == ["cluster.app:build"]


def _bufs_call_is_the_same(example: Example) -> None:
    """The page's call with buf, which is run, sends the same message to the same method."""
    calls = [shlex.split(one.text) for one in examples(example.page) if re.match(r"buf curl|grpcurl", one.text)]
    by_buf, by_grpcurl = calls
    assert json.loads(by_buf[by_buf.index("--data") + 1]) == json.loads(by_grpcurl[by_grpcurl.index("-d") + 1])
    assert by_buf[-1] == f"http://{by_grpcurl[-2]}/{by_grpcurl[-1]}"


LIVE = "needs a live Kubernetes"
TABLE = (
    NotRun(
        r"(python3(\.11)? -m venv|\.|pip install -e) \S+", "installs packages; CI does", _continuous_integration_does
    ),
    NotRun(r"pip install 'moe-cluster\[\w+\]'", "installs packages", _extra_is_there),
    NotRun(r"moe-cluster serve .* --tracing .*", "needs a receiver of traces", is_parsed),
    NotRun(r"moe-cluster plan .* --(calibration|trace) .*", "needs a file that its reader makes", is_parsed),
    NotRun(r"pytest( .*)?", "runs the tests in a test", "tests/conftest.py::pytest_configure"),
    NotRun(r"python deploy/demo/train\.py", "takes minutes", _script_is_there),
    NotRun(r"(OMP_WAIT_POLICY=\S+ )?python tests/\S+\.py .*", "measures for minutes", _script_is_there),
    NotRun(
        r"moe-cluster demo",
        "is run by another test",
        "tests/served/test_demo.py::test_the_demo_shows_its_parts_and_ctrl_c_drains_and_stops_it",
    ),
    NotRun(r"moe-cluster bench .*", "measures for minutes, or on a GPU", is_parsed),
    NotRun(
        r"promql: .*",
        "is an expression for Prometheus",
        "tests/unit/test_observability_runbook.py::test_the_runbooks_expressions_ask_for_what_exists",
    ),
    NotRun(r"helm install .*", LIVE, _chart_renders),
    NotRun(r"helm test .*", LIVE, _release_has_a_test),
    NotRun(r"kubectl .*", LIVE, _object_is_in_the_release),
    NotRun(r"moe-cluster \w+ .*--lora-adapters .*", "needs adapters of the user's", is_parsed),
    NotRun(
        r"curl \S+/v1/(completions .*\"law\"|(un)?load_lora_adapter ).*",
        "needs adapters of the user's",
        "tests/unit/test_adapters_served.py::test_an_admin_key_alone_changes_adapters_by_vllms_calls",
    ),
    NotRun(r"docker build .*", "needs Docker", _image_is_the_charts),
    NotRun(r"ray start .*", "starts a Ray of several machines", _ray_takes_the_options),
    NotRun(r"serve deploy .*", "needs such a Ray, with GPUs", _serve_takes_the_file),
    NotRun(r"grpcurl .*", "comes in no package of Python or npm", _bufs_call_is_the_same),
)
# Pages without commands for this test, and why.
ELSEWHERE = {
    "BENCHMARKS.md": "records of measurements, which tests/unit/test_site.py parses",
    "docs/clients.md": "tests/served/test_clients_page.py runs its blocks",
}
