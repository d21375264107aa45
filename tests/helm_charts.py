"""Renders the chart with Helm 3 (the binary that $HELM names) and Helm 4 (the package helm-python-sdk)."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "helm" / "moe-cluster"
RELEASE = "demo"
WARNING = 2  # the least severity of a lint message that --strict fails for
KUBE_VERSION = "v1.31.0"  # the cluster's version for Helm 3, whose default is older than the chart's oldest


class Refused(Exception):
    """Helm does not render these values; the message is what a user sees."""


class Helm3:
    def __init__(self):
        self.binary = os.environ["HELM"]

    def lint(self, values):
        """The messages with which `helm lint --strict` fails."""
        done = self._run(["lint", "--strict"], CHART, values)
        return done.stdout.splitlines() if done.returncode else []

    def render(self, values, name=RELEASE, chart=CHART):
        """Template path -> text, without NOTES.txt."""
        done = self._run(["template", name, "--namespace=serving", f"--kube-version={KUBE_VERSION}"], chart, values)
        if done.returncode:
            raise Refused(done.stderr)
        texts = {}
        for part in done.stdout.split("---\n# Source: ")[1:]:
            path, text = part.split("\n", 1)
            texts[path] = texts.get(path, "") + "---\n" + text
        return texts

    def _run(self, verb, chart, values):
        command = [self.binary, *verb, str(chart), "--values=-"]
        return subprocess.run(command, input=json.dumps(values), capture_output=True, text=True, timeout=60)


class Helm4:
    def __init__(self):
        worker = [sys.executable, str(Path(__file__).with_name("helm_worker.py"))]
        self._process = subprocess.Popen(
            worker, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def lint(self, values):
        report = self._ask(lint=True, chart=str(CHART), values=values)
        return [m["error"] for m in report["messages"] if m["severity"] >= WARNING]

    def render(self, values, name=RELEASE, chart=CHART):
        return self._ask(lint=False, chart=str(chart), values=values, name=name)

    def _ask(self, **request):
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        reply = json.loads(self._process.stdout.readline())
        if "error" in reply:
            raise Refused(reply["error"])
        return reply["result"]


@cache
def helm(version):
    """One for all tests. Skips the test where that version is not installed."""
    if version == 3:
        if "HELM" not in os.environ:
            pytest.skip("HELM names no Helm 3")
        return Helm3()
    if importlib.util.find_spec("helm_python") is None:
        pytest.skip("helm-python-sdk is not installed")
    return Helm4()


def any_helm():
    return helm(3 if importlib.util.find_spec("helm_python") is None else 4)


DEFAULT = "default"  # the chart's own values and no others
SHAPES = [DEFAULT, *sorted(path.name.removesuffix("-values.yaml") for path in (CHART / "ci").glob("*-values.yaml"))]


@cache
def _shape(name):
    return {} if name == DEFAULT else yaml.safe_load((CHART / "ci" / f"{name}-values.yaml").read_text())


def values_of(name, changes=None):
    """A shape's values. changes: dotted path -> another value; None takes the path away."""
    values = copy.deepcopy(_shape(name))
    for path, value in (changes or {}).items():
        *parents, last = path.split(".")
        place = values
        for key in parents:
            place = place.setdefault(key, {})
        if value is None:
            place.pop(last, None)
        else:
            place[last] = value
    return values


class Objects:
    """The objects and notes of a release."""

    def __init__(self, texts):
        self.notes = next((text for path, text in texts.items() if path.endswith("NOTES.txt")), "")
        self.all = [
            found
            for path, text in sorted(texts.items())
            if path.endswith(".yaml")
            for found in yaml.load_all(text, Loader=yaml.CSafeLoader)
            if found
        ]

    def of(self, kind):
        return [found for found in self.all if found["kind"] == kind]

    def one(self, kind):
        [found] = self.of(kind)
        return found

    @property
    def cluster(self):
        return self.one("RayService")["spec"]["rayClusterConfig"]

    @property
    def serve_config(self):
        return yaml.safe_load(self.one("RayService")["spec"]["serveConfigV2"])

    @property
    def groups(self):
        return {group["groupName"]: group for group in self.cluster["workerGroupSpecs"]}

    @property
    def pods(self):
        """Templates of the Ray pods by their role."""
        return {"head": self.cluster["headGroupSpec"]["template"]} | {
            name: group["template"] for name, group in self.groups.items()
        }


@cache
def _rendered(key, version, name):
    return Objects((helm(version) if version else any_helm()).render(json.loads(key), name))


def rendered(shape, changes=None, version=None, name=RELEASE):
    """The objects of a shape with changes, rendered once; by the newest Helm there is unless a version is named."""
    return _rendered(json.dumps(values_of(shape, changes), sort_keys=True), version, name)


def container(pod):
    [found] = pod["spec"]["containers"]
    return found
