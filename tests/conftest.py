"""Shared by the whole session: a Ray of this machine, one served application on it, the demo checkpoint."""

import contextlib
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import grpc
import pytest

import cluster
from cluster.checkpoint.made.demo import write_demo_checkpoint
from cluster.kernels.native.library import missing_because, variants

LOGICAL_GPUS = 16  # Ray only counts them

pytest_plugins = ["two_processes"] if find_spec("xdist") else []


class Named:
    """Names a failure at once and, when the run is interrupted, what was running: whoever reads a run that did not
    come to its end learns why."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._running: dict[str, None] = {}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._running[nodeid] = None

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._running.pop(nodeid, None)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = str(crash.message if crash else report.longrepr).partition("\n")[0]
            self._say(f"{report.nodeid}: {report.when} failed after {report.duration:.0f} s: {reason}")

    def pytest_keyboard_interrupt(self) -> None:
        self._say(f"interrupted in {', '.join(self._running) or 'no test'}")

    def _say(self, line: str) -> None:
        writer = self._config.get_terminal_writer()
        writer.line(f"\n{line}")
        writer.flush()


def pytest_configure(config: pytest.Config) -> None:
    """Sets the environment before anything is imported. The environment's proxy does not reach the tests' servers."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Named(config))
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(
        filter(None, (os.environ.get("no_proxy", os.environ.get("NO_PROXY")), "127.0.0.1", "localhost"))
    )
    if not Path("/dev/nvidiactl").exists():  # no GPU: whoever imports Triton first, it has its interpreter
        os.environ.setdefault("TRITON_INTERPRET", "1")
    # Ray gives its workers niceness 15: beside the second process of the tests, which computes, they would get a
    # thirtieth of a core, and wait for one another.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # A shell's background job ignores Ctrl-C, and so would the processes whose end by it is tested.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"native kernels: {', '.join(variants()) or f'none, {missing_because()}'}")


@pytest.fixture(scope="session")
def demo_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_dir = tmp_path_factory.mktemp("demo") / "demo-moe"
    write_demo_checkpoint(model_dir, seed=0)
    return model_dir


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A link to the folder from which Ray's processes import this package; to turn it is to install another version.

    Beside the package stands a poison for some requests, see served/poison.py.
    """
    versions = tmp_path_factory.mktemp("installed")
    (versions / "this").mkdir()
    (versions / "this" / "cluster").symlink_to(Path(cluster.__file__).parent)
    (versions / "this" / "sitecustomize.py").symlink_to(Path(__file__).parent / "served" / "poison.py")
    (versions / "now").symlink_to(versions / "this")
    return versions / "now"


@pytest.fixture(scope="session")
def ray_cluster(installed: Path) -> Iterator[Any]:
    """A connected Ray in a directory of its own, on loopback, with logical CPUs and GPUs for every test."""
    import ray

    from cluster.private import private_files
    from cluster.runtime.front.haproxy import local_environment, set_environment
    from cluster.runtime.names import RAY_FOLDER
    from cluster.runtime.start.local_ray import loopback

    temp_dir = tempfile.mkdtemp(prefix="moe-test-", dir="/tmp")  # short: Unix sockets' paths are bounded
    outside = pytest.MonkeyPatch()
    outside.setenv("PYTHONPATH", str(installed))
    outside.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")  # milliseconds until a span is sent
    # Ray's processes look for packages in the folder that it was started from, before PYTHONPATH.
    environment = set_environment(local_environment(Path(temp_dir)))
    with environment, loopback(), private_files(), contextlib.chdir(temp_dir):
        ray.init(
            address="local",
            num_cpus=64,
            num_gpus=LOGICAL_GPUS,
            resources={"expert_node": 1},
            namespace="moe-cluster",
            include_dashboard=False,
            object_store_memory=256 << 20,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=f"{temp_dir}/{RAY_FOLDER}",
            _node_ip_address="127.0.0.1",
            # else 64 workers start that nobody uses, and a port shows Ray's metrics
            _system_config={"prestart_worker_first_driver": False, "enable_metrics_collection": False},
        )
    outside.undo()
    yield ray
    ray.shutdown()
    shutil.rmtree(temp_dir, ignore_errors=True)


class SharedApplication:
    """The served application that tests share, as `moe-cluster serve` starts it: two attention replicas on two expert
    shards, float32. It starts when a test needs it and it does not run."""

    def __init__(self, model_dir: Path, traces_port: int) -> None:
        self._model_dir, self._traces_port = model_dir, traces_port
        self.admin_key = ""
        self._cluster: Any = None

    def running(self) -> Any:
        from cluster.config import ClusterConfig
        from cluster.runtime.start.served import ServedCluster, ServeOptions
        from cluster.serving.admission.api_keys import new_key

        if self._cluster is None:
            self.admin_key, line = new_key("root")
            admins = self._model_dir.parent / "admins"
            admins.write_text(line)
            config = ClusterConfig(
                model=str(self._model_dir),
                model_id="demo-moe",
                model_aliases="demo, Qwen/Qwen1.5-MoE-A2.7B-Chat",  # of docs/clients.md
                dtype="float32",
                device="cpu",
                attention_replicas=2,
                expert_shards=2,
                kv_cache_bytes=4 << 20,
                max_num_seqs=16,
                max_num_batched_tokens=512,
                max_waiting=16,
                metrics_port=0,
                admin_keys_file=str(admins),
                drain_timeout_s=60.0,  # for what runs in the background of a busy machine, too
                tracing=True,
                tracing_endpoint=f"http://127.0.0.1:{self._traces_port}",
                tracing_ratio=0.0,  # of requests whose callers ask for it
            )
            self._cluster = ServedCluster(config, ServeOptions(grpc_port=0))
        return self._cluster

    def end(self) -> None:
        if self._cluster is not None:
            self._cluster.close()
            self._cluster = None


@pytest.fixture(scope="session")
def receiver() -> Iterator[Any]:
    """Of the shared application's traces."""
    from otlp_receiver import OtlpReceiver

    made = OtlpReceiver()
    yield made
    made.close()


@pytest.fixture(scope="session")
def application(ray_cluster: Any, demo_checkpoint: Path, receiver: Any) -> Iterator[SharedApplication]:
    shared = SharedApplication(demo_checkpoint, receiver.grpc_port)
    yield shared
    shared.end()


@pytest.fixture
def served(application: SharedApplication) -> Any:
    """The shared application. A test leaves it unchanged: complete, with the same numbers of shards and replicas."""
    return application.running()


@pytest.fixture(scope="module")
def served_for_good(application: SharedApplication) -> Iterator[Any]:
    """The shared application, for tests that change it for good: no test of another module gets it afterwards."""
    yield application.running()
    application.end()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests last that change the shared application for good, so that the others share one."""
    items.sort(key=lambda item: "served_for_good" in getattr(item, "fixturenames", ()))


@pytest.fixture
def channel(served: Any) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{served.grpc_port}") as channel:
        yield channel
