"""The programs that read the files in deploy/ accept them, as far as that can be tried without a container engine."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from cluster import cli
from cluster.config import ClusterConfig
from cluster.kernels.native.library import missing_because
from cluster.runtime.start.application import GRPC_SERVICERS

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
SERVE_FILES = sorted(path.name for path in DEPLOY.glob("serve*.yaml"))
DEFAULTS = {field.name: field.default for field in fields(ClusterConfig)}


def read(name):
    """A file as `serve deploy` reads it; an unknown key is an error."""
    return ServeDeploySchema.model_validate(yaml.safe_load((DEPLOY / name).read_text()))


def found(path):
    module, _, name = path.replace(":", ".").rpartition(".")
    return getattr(import_module(module), name)


@pytest.mark.parametrize("name", SERVE_FILES)
def test_the_application_can_be_imported_and_takes_the_arguments(name):
    [application] = read(name).applications
    assert application.import_path == "cluster.app:build"
    assert callable(found(application.import_path))
    ClusterConfig.from_mapping(application.args)


def test_one_file_has_every_argument():
    """So that a newcomer sees what there is."""
    [application] = read("serve.yaml").applications
    assert application.args.keys() == DEFAULTS.keys()


@pytest.mark.parametrize("name", [name for name in SERVE_FILES if name != "serve.yaml"])
def test_the_other_files_have_only_arguments_that_differ(name):
    [application] = read(name).applications
    assert {key for key, value in application.args.items() if DEFAULTS[key] in (value, MISSING)} == {"model"}


@pytest.mark.parametrize("name", SERVE_FILES)
def test_the_proxy_registers_the_command_lines_servicers(name):
    schema = read(name)
    assert schema.grpc_options.grpc_servicer_functions == GRPC_SERVICERS
    assert [path for path in GRPC_SERVICERS if not callable(found(path))] == []
    assert schema.grpc_options.enable_reflection
    assert schema.grpc_options.request_timeout_s is None  # it would end long streams


def test_the_shapes_are_those_that_their_names_say():
    def config(name):
        return ClusterConfig.from_mapping(read(name).applications[0].args)

    laptop, large, mixed, dense = (
        config(f"serve-{shape}.yaml") for shape in ("laptop", "57b", "experts-on-cpu", "dense")
    )
    assert laptop.device == "cpu"
    assert (large.attention_replicas, large.expert_shards) == (2, 4)
    assert large.gpus_per_attention_replica is large.gpus_per_expert_shard is None  # a whole one each
    assert (dense.attention_replicas, dense.expert_shards) == (2, 0)
    assert (mixed.device, mixed.gpus_per_attention_replica, mixed.gpus_per_expert_shard) == ("auto", 1, 0)


# The image


def stages():
    """Stage -> (its base, its instructions); continued lines are joined."""
    text = (DEPLOY / "Dockerfile").read_text()
    made, current = {}, None
    for line in re.sub(r"\\\n", "", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)).splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            current = made[name] = (base, [])
        elif word and current:
            current[1].append((word, rest.strip()))
    return made


def lineage(name):
    """A stage's instructions with those that it builds on, first to last."""
    base, instructions = stages()[name]
    return (lineage(base) if base in stages() else []) + instructions


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_image_runs_as_a_user_with_the_package_in_it(target):
    instructions = lineage(target)
    assert [rest for word, rest in instructions if word == "USER"] == ["1000"]
    assert ("COPY", f"--from=builder-{target} /opt/venv /opt/venv") in instructions
    assert any(word == "ENV" and "PATH=/opt/venv/bin:$PATH" in rest for word, rest in instructions)
    [check] = [rest for word, rest in instructions if word == "HEALTHCHECK"]
    command = json.loads(check.partition("CMD ")[2])
    compile(command[-1], "HEALTHCHECK", "exec")


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_image_has_the_native_kernels_and_no_compiler(target):
    """A stage without a compiler would install the package without them, so the build asks the installed one."""
    steps = [rest for word, rest in lineage(f"builder-{target}") if word == "RUN"]
    [compiler] = [rest for rest in steps if "install --yes --no-install-recommends g++" in rest]
    assert steps.index(compiler) < len(steps) - 1
    asks = re.findall(r"pip install \"/src\[tracing\]\" +&& python -I -c \"(.+)\"$", steps[-1])
    assert run_python(*asks, MOE_CLUSTER_KERNELS_LIBRARY="/nowhere.so") == 1
    if not missing_because():
        assert run_python(*asks) == 0
    assert not [rest for word, rest in lineage(target) if word == "RUN" and "g++" in rest]
    assert "**/*.so" in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()


def run_python(code, **environment):
    command = [sys.executable, "-I", "-c", code]
    return subprocess.run(command, env=os.environ | environment, stderr=subprocess.DEVNULL, timeout=120).returncode


def test_the_health_check_fails_where_nobody_serves():
    [check] = [rest for word, rest in lineage("cpu") if word == "HEALTHCHECK"]
    _, *arguments = json.loads(check.partition("CMD ")[2])
    done = subprocess.run(
        [sys.executable, *arguments], env={"GRPC_PORT": "1"}, cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (1, "")


def test_versions_are_pinned_and_torch_is_the_projects():
    text = (DEPLOY / "Dockerfile").read_text()
    [wanted] = [
        requirement
        for requirement in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        if requirement.startswith("torch==")
    ]
    assert {f"torch=={version}" for version in re.findall(r"ARG TORCH_VERSION=(\S+)", text)} == {wanted}
    images = re.findall(r"ARG \w+_IMAGE=(\S+)", text)
    compose = yaml.safe_load((DEPLOY / "docker-compose.yaml").read_text())
    images += [service["image"] for service in compose["services"].values() if "build" not in service]
    assert len(images) == 4
    assert [image for image in images if not re.search(r":v?\d+\.\d+\.\d+", image)] == []


def test_copied_files_exist_and_are_not_ignored():
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    for _, instructions in stages().values():
        for word, rest in instructions:
            if word == "COPY" and not rest.startswith("--from="):
                for source in rest.split()[:-1]:
                    assert (ROOT / source).exists(), source
                    assert f"!{source}" in ignored


def test_hadolint_finds_nothing():
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, DEPLOY / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


# Everything on one machine


@pytest.fixture
def services():
    return yaml.safe_load((DEPLOY / "docker-compose.yaml").read_text())["services"]


def test_compose_starts_a_command_that_there_is(services):
    """With the ports that the other files have."""
    program, *arguments = services["cluster"]["command"]
    assert program == "moe-cluster"
    parsed = cli._parser().parse_args(arguments)
    assert (parsed.grpc_port, parsed.metrics_port, parsed.keep) == (9000, 9464, True)
    assert services["cluster"]["build"]["target"] in stages()
    scraped = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())["scrape_configs"][0]
    assert scraped["static_configs"] == [{"targets": ["127.0.0.1:9464"]}]


def test_compose_mounts_existing_files_where_programs_look_for_them(services):
    for name, service in services.items():
        mounts = [mount.split(":") for mount in service.get("volumes", ())]
        assert [source for source, _, _ in mounts if not (DEPLOY / source).exists()] == []
        assert {mode for _, _, mode in mounts} <= {"ro"}
        inside = [(target, DEPLOY / source) for source, target, _ in mounts]
        words = [*service.get("command", ()), *service.get("environment", {}).values()]
        for path in re.findall(r"(?<==)(/etc/\S+)|^(/etc/\S+)", "\n".join(words), flags=re.MULTILINE):
            wanted = "".join(path)
            [at] = [(target, source) for target, source in inside if wanted.startswith(target)]
            assert (at[1] / wanted.removeprefix(at[0]).lstrip("/")).exists(), f"{name}: {wanted}"


def test_compose_opens_ports_on_this_machine_only(services):
    ports = [port for service in services.values() for port in service.get("ports", ())]
    assert len(ports) == 4
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []


def test_grafana_finds_its_datasource_and_its_dashboards(services):
    provisioning = DEPLOY / "grafana" / "provisioning"
    [source] = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://127.0.0.1:9090")
    [provider] = yaml.safe_load((provisioning / "dashboards" / "moe-cluster.yaml").read_text())["providers"]
    assert f"./grafana:{provider['options']['path']}:ro" in services["grafana"]["volumes"]
