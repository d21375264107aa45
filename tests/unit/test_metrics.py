"""The definitions, and the collector over real processes. One test binds a port of this host."""

import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

import cluster.errors
from cluster.errors import SetupError
from cluster.metrics import (
    ControllerMetrics,
    DispatchMetrics,
    EngineMetrics,
    IngressMetrics,
    NodeCollector,
    ResponseStoreMetrics,
    ShardMetrics,
    multiprocess_env,
    new_registry,
    report_version,
)
from cluster.metrics.process import is_running

# Every metric with its type and its labels, as documented for dashboards and alerts.
METRICS = {
    "moecluster_requests_total": ("counter", {"outcome"}),
    "moecluster_requests_running": ("gauge", set()),
    "moecluster_time_to_first_token_seconds": ("histogram", set()),
    "moecluster_inter_token_latency_seconds": ("histogram", set()),
    "moecluster_request_duration_seconds": ("histogram", set()),
    "moecluster_request_replays_total": ("counter", set()),
    "moecluster_results_total": ("counter", {"method"}),
    "moecluster_prompt_tokens_total": ("counter", set()),
    "moecluster_balanced_requests_total": ("counter", {"outcome"}),
    "moecluster_generated_tokens_total": ("counter", set()),
    "moecluster_engine_running_sequences": ("gauge", {"replica"}),
    "moecluster_engine_held_sequences": ("gauge", {"replica"}),
    "moecluster_engine_waiting_sequences": ("gauge", {"replica"}),
    "moecluster_engine_kv_used_blocks": ("gauge", {"replica"}),
    "moecluster_engine_kv_capacity_blocks": ("gauge", {"replica"}),
    "moecluster_engine_step_seconds": ("histogram", {"replica"}),
    "moecluster_engine_step_sequences": ("histogram", {"replica"}),
    "moecluster_engine_step_tokens_total": ("counter", {"replica", "phase"}),
    "moecluster_engine_reused_tokens_total": ("counter", {"replica"}),
    "moecluster_engine_preemptions_total": ("counter", {"replica"}),
    "moecluster_engine_drafted_tokens_total": ("counter", {"replica"}),
    "moecluster_engine_accepted_tokens_total": ("counter", {"replica"}),
    "moecluster_engine_finished_sequences_total": ("counter", {"replica", "reason"}),
    "moecluster_engine_queue_wait_seconds": ("histogram", {"replica"}),
    "moecluster_dispatch_rows_total": ("counter", {"replica", "shard_id"}),
    "moecluster_dispatch_sent_bytes_total": ("counter", {"replica", "shard_id"}),
    "moecluster_dispatch_received_bytes_total": ("counter", {"replica", "shard_id"}),
    "moecluster_dispatch_round_trip_seconds": ("histogram", {"replica", "shard_id"}),
    "moecluster_dispatch_fallbacks_total": ("counter", {"replica", "shard_id"}),
    "moecluster_controller_imbalance": ("gauge", set()),
    "moecluster_controller_changes_total": ("counter", {"kind", "outcome"}),
    "moecluster_controller_moved_experts_total": ("counter", set()),
    "moecluster_controller_leaving_shards": ("gauge", set()),
    "moecluster_dispatch_hedged_total": ("counter", {"replica", "shard_id"}),
    "moecluster_dispatch_rerouted_rows_total": ("counter", {"replica", "shard_id"}),
    "moecluster_build_info": ("gauge", {"role", "version"}),
    "moecluster_dispatch_plan_epoch": ("gauge", {"replica"}),
    "moecluster_shard_compute_seconds": ("histogram", {"shard_id"}),
    "moecluster_shard_rows_total": ("counter", {"shard_id"}),
    "moecluster_shard_queue_wait_seconds": ("histogram", {"shard_id"}),
    "moecluster_shard_weights_bytes": ("gauge", {"shard_id"}),
    "moecluster_expert_tokens_total": ("counter", {"layer_id", "expert_id"}),
    "moecluster_controller_plan_epoch": ("gauge", set()),
    "moecluster_controller_up_shards": ("gauge", set()),
    "moecluster_controller_wanted_shards": ("gauge", set()),
    "moecluster_controller_respawns_total": ("counter", {"shard_id"}),
    "moecluster_controller_experts": ("gauge", {"copies"}),
    "moecluster_responses_kept": ("gauge", set()),
    "moecluster_responses_kept_bytes": ("gauge", set()),
    "moecluster_responses_running": ("gauge", set()),
    "moecluster_responses_evicted_total": ("counter", {"reason"}),
}


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def filled(registry: CollectorRegistry) -> CollectorRegistry:
    """Every class made, every method called once."""
    report_version(registry, "engine")
    ingress = IngressMetrics(registry)
    ingress.started()
    ingress.finished("stop")
    ingress.first_token(0.2)
    ingress.inter_token(0.06, 3)
    ingress.end_to_end(1.0)
    ingress.result("Score")
    ingress.prompt_tokens(7)
    ingress.balanced("hit")
    ingress.generated_tokens(9)
    engine = EngineMetrics(registry, "0")
    engine.state(running=3, held=1, waiting=2, used_blocks=10, total_blocks=64)
    engine.step(0.02, num_prefill_tokens=5, num_decode_tokens=3, num_seqs=4)
    engine.preempted()
    engine.finished("length")
    engine.queue_wait(0.01)
    dispatch = DispatchMetrics(registry, "0")
    dispatch.sent(1, rows=4, num_bytes=100)
    dispatch.returned(1, seconds=0.003, num_bytes=80)
    dispatch.rerouted(1, rows=2)
    dispatch.hedged(1)
    dispatch.plan_epoch(5)
    shard = ShardMetrics(registry, 1)
    shard.computed(0.002, rows=4)
    shard.queue_wait(0.001)
    shard.expert_tokens(layer_id=2, expert_id=7, count=11)
    shard.weights_bytes(1000)
    controller = ControllerMetrics(registry)
    controller.plan_epoch(5)
    controller.shards(up=1, wanted=2)
    controller.imbalance(1.5)
    controller.changed("rebalance", "done", 7)
    controller.respawned(1)
    controller.coverage(zero=1, one=60, more=3)
    responses = ResponseStoreMetrics(registry)
    responses.state(kept=3, kept_bytes=9000, running=1)
    responses.evicted("room")
    return registry


def test_every_metric_has_the_documented_type_and_labels(filled: CollectorRegistry) -> None:
    found = {}
    for family in filled.collect():
        name = family.name + "_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        found[name] = (family.type, labels)
    assert found == METRICS


def test_names_carry_prefix_and_unit_and_help_is_advice(filled: CollectorRegistry) -> None:
    for family in filled.collect():
        name = family.name + "_total" if family.type == "counter" else family.name
        assert re.fullmatch(r"moecluster(_[a-z]+)+", name)
        assert name.endswith("_total") == (family.type == "counter")
        if family.type == "histogram":
            assert name.endswith(("_seconds", "_sequences"))
        sentences = re.findall(r"[.?:;] \w", family.documentation)
        assert sentences, f"{name}: says what it is, not what to do with it"
        assert family.documentation.endswith(".")
        assert "  " not in family.documentation


def test_values_arrive_where_they_belong(filled: CollectorRegistry) -> None:
    """inter_token(0.06, 3) is three observations of 0.02."""

    def value(name: str, **labels: str) -> float | None:
        return filled.get_sample_value(name, labels)

    assert value("moecluster_requests_total", outcome="stop") == 1
    assert value("moecluster_requests_total", outcome="unavailable") == 0
    assert value("moecluster_requests_running") == 0
    assert value("moecluster_inter_token_latency_seconds_count") == 3
    assert value("moecluster_inter_token_latency_seconds_sum") == pytest.approx(0.06)
    assert value("moecluster_inter_token_latency_seconds_bucket", le="0.02") == 3
    assert value("moecluster_inter_token_latency_seconds_bucket", le="0.01") == 0
    assert value("moecluster_engine_kv_used_blocks", replica="0") == 10
    assert value("moecluster_engine_kv_capacity_blocks", replica="0") == 64
    assert value("moecluster_engine_step_tokens_total", replica="0", phase="prefill") == 5
    assert value("moecluster_engine_step_tokens_total", replica="0", phase="decode") == 3
    assert value("moecluster_engine_step_sequences_sum", replica="0") == 4
    assert value("moecluster_engine_finished_sequences_total", replica="0", reason="length") == 1
    assert value("moecluster_dispatch_sent_bytes_total", replica="0", shard_id="1") == 100
    assert value("moecluster_dispatch_received_bytes_total", replica="0", shard_id="1") == 80
    assert value("moecluster_dispatch_rerouted_rows_total", replica="0", shard_id="1") == 2
    assert value("moecluster_dispatch_hedged_total", replica="0", shard_id="1") == 1
    assert value("moecluster_expert_tokens_total", layer_id="2", expert_id="7") == 11
    assert value("moecluster_controller_up_shards") == 1
    assert value("moecluster_controller_wanted_shards") == 2
    copies = [value("moecluster_controller_experts", copies=c) for c in ("0", "1", "2+")]
    assert copies == [1, 60, 3]


def test_shards_of_one_process_share_a_registry(registry: CollectorRegistry) -> None:
    for shard_id in (0, 1):
        ShardMetrics(registry, shard_id).computed(0.01, rows=3 + shard_id)
        ShardMetrics(registry, shard_id).expert_tokens(0, 5, 10)
    assert registry.get_sample_value("moecluster_shard_rows_total", {"shard_id": "0"}) == 3
    assert registry.get_sample_value("moecluster_shard_rows_total", {"shard_id": "1"}) == 4
    labels = {"layer_id": "0", "expert_id": "5"}
    assert registry.get_sample_value("moecluster_expert_tokens_total", labels) == 20


def test_an_unforeseen_outcome_is_counted_too(registry: CollectorRegistry) -> None:
    ingress, engine = IngressMetrics(registry), EngineMetrics(registry, "a")
    ingress.finished("not_found")
    engine.finished("other")
    assert registry.get_sample_value("moecluster_requests_total", {"outcome": "not_found"}) == 1
    labels = {"replica": "a", "reason": "other"}
    assert registry.get_sample_value("moecluster_engine_finished_sequences_total", labels) == 1


# One process of a node: it counts, reports that, and lives until its input ends. With "fork" it has a child
# that counts as well, in files of its own.
PROCESS = """
import os, sys
from cluster.metrics import EngineMetrics, IngressMetrics, new_registry
registry = new_registry()
replica, tokens, seqs = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
ingress, engine = IngressMetrics(registry), EngineMetrics(registry, replica)
if "fork" in sys.argv and os.fork() == 0:
    ingress.generated_tokens(1000)
    os._exit(0)
ingress.started()
if "fork" in sys.argv:
    os.wait()
ingress.generated_tokens(tokens)
ingress.first_token(0.02)
engine.state(seqs, 0, 0, 1, 64)
print("counted", flush=True)
sys.stdin.read()
"""


class Processes:
    """Starts processes that write to `directory`; ends what is left."""

    def __init__(self, directory: Path) -> None:
        self.env = {**os.environ, **multiprocess_env(directory)}
        self.running: list[subprocess.Popen[str]] = []

    def start(self, replica: str, *, tokens: int, seqs: int, fork: bool = False) -> subprocess.Popen[str]:
        command = [
            sys.executable,
            "-c",
            PROCESS,
            replica,
            str(tokens),
            str(seqs),
            *(["fork"] if fork else []),
        ]
        process = subprocess.Popen(command, env=self.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.running.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "counted\n"
        return process

    def close(self) -> None:
        for process in self.running:
            process.kill()
            process.communicate()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "metrics"


@pytest.fixture
def processes(directory: Path) -> Iterator[Processes]:
    processes = Processes(directory)
    yield processes
    processes.close()


@pytest.fixture
def collector(directory: Path) -> Iterator[NodeCollector]:
    collector = NodeCollector(directory, "127.0.0.1", 0)
    yield collector
    collector.close()


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def samples(text: bytes) -> dict[str, float]:
    """One scrape as {"name{label="value"}": value}."""
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            labels = ",".join(f'{k}="{v}"' for k, v in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


TOKENS = "moecluster_generated_tokens_total"
FIRST_TOKENS = "moecluster_time_to_first_token_seconds_count"


def test_counters_stay_and_gauges_go_when_a_process_is_killed(processes: Processes, collector: NodeCollector) -> None:
    first = processes.start("a", tokens=5, seqs=2)
    processes.start("b", tokens=7, seqs=3)
    both = samples(collector.render())
    assert both[TOKENS] == 12
    assert both["moecluster_requests_running"] == 2
    assert both['moecluster_engine_running_sequences{replica="a"}'] == 2

    kill(first)
    for _ in range(2):  # the scrape that folds and one after it
        after = samples(collector.render())
        assert after[TOKENS] == 12
        assert after[FIRST_TOKENS] == 2
        assert after['moecluster_time_to_first_token_seconds_bucket{le="0.01"}'] == 0
        assert after['moecluster_time_to_first_token_seconds_bucket{le="0.025"}'] == 2
        assert after["moecluster_requests_running"] == 1
        assert 'moecluster_engine_running_sequences{replica="a"}' not in after
        assert after['moecluster_engine_running_sequences{replica="b"}'] == 3

    processes.start("a", tokens=100, seqs=4)
    restarted = samples(collector.render())
    assert restarted[TOKENS] == 112
    assert restarted['moecluster_engine_running_sequences{replica="a"}'] == 4


def test_a_killed_process_that_nobody_reaped_counts_as_dead(processes: Processes, collector: NodeCollector) -> None:
    process = processes.start("a", tokens=5, seqs=2)
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and left a zombie
    after = samples(collector.render())
    assert after[TOKENS] == 5
    assert "moecluster_requests_running" not in after


def test_files_stay_bounded_over_twenty_generations(
    processes: Processes, collector: NodeCollector, directory: Path
) -> None:
    """Alive: one counter, one histogram, one gauge file. Dead: two archives. And the collector's lock."""
    for generation in range(1, 21):
        process = processes.start("a", tokens=generation, seqs=1)
        assert samples(collector.render())[TOKENS] == generation * (generation + 1) / 2
        assert len(list(directory.iterdir())) <= 6
        kill(process)
    assert samples(collector.render())[TOKENS] == 210
    names = sorted(path.name for path in directory.iterdir())
    assert names == ["collector.lock", "counter_archive.db", "histogram_archive.db"]


def test_a_forked_process_writes_files_of_its_own(processes: Processes, collector: NodeCollector) -> None:
    process = processes.start("a", tokens=5, seqs=2, fork=True)
    kill(process)
    assert samples(collector.render())[TOKENS] == 1005


def test_a_process_with_a_dead_ones_pid_does_not_revive_its_gauges(
    processes: Processes, collector: NodeCollector, directory: Path
) -> None:
    """A live process's files are renamed as if an earlier one with its pid had left them."""
    process = processes.start("a", tokens=5, seqs=2)
    for path in list(directory.glob(f"*_{process.pid}-*.db")):
        path.rename(path.with_name(re.sub(r"-\d+\.db$", "-1.db", path.name)))
    after = samples(collector.render())
    assert after[TOKENS] == 5
    assert 'moecluster_engine_running_sequences{replica="a"}' not in after
    assert is_running(process.pid, None)
    assert not is_running(process.pid, 1)


class Crash(BaseException):
    pass


@pytest.mark.parametrize("point", range(8))
def test_a_collector_that_dies_while_folding_loses_and_doubles_nothing(
    processes: Processes, directory: Path, monkeypatch: pytest.MonkeyPatch, point: int
) -> None:
    """Dies before its `point`-th renaming or removal; the next collector's totals are those before the fold.

    The expected totals come from prometheus_client's own merge of the files as the processes left them. Two
    processes with two counted files each make eight operations: the journal's renaming, two archives', four
    files' removals, the journal's.
    """
    for replica, tokens in (("a", 5), ("b", 7)):
        kill(processes.start(replica, tokens=tokens, seqs=1))
    left = [str(path) for path in directory.glob("*.db") if not path.name.startswith("gauge")]
    families = MultiProcessCollector.merge(left)
    expected = {
        (sample.name, *sorted(sample.labels.items())): sample.value for family in families for sample in family.samples
    }
    for gauge in directory.glob("gauge_*"):
        gauge.unlink()
    operations = 0

    def dies_at_point(function):  # type: ignore[no-untyped-def]
        def wrapped(path, *args, **options):  # type: ignore[no-untyped-def]
            nonlocal operations
            if function.__name__ == "replace" or path.suffix != ".fold":  # not: making room for a fresh copy
                operations += 1
                if operations > point:
                    raise Crash
            return function(path, *args, **options)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies_at_point(os.replace))
        patch.setattr(Path, "unlink", dies_at_point(Path.unlink))
        dying = NodeCollector(directory, "127.0.0.1", 0)
        with pytest.raises(Crash):
            dying.render()
    dying.close()

    successor = NodeCollector(directory, "127.0.0.1", 0)
    found = {}
    for family in text_string_to_metric_families(successor.render().decode()):
        for sample in family.samples:
            found[(sample.name, *sorted(sample.labels.items()))] = sample.value
    successor.close()
    assert found == expected
    assert not list(directory.glob("*.fold"))
    assert not list(directory.glob("fold.json*"))


def test_a_damaged_file_is_reported_and_the_others_are_served(
    processes: Processes, collector: NodeCollector, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    processes.start("a", tokens=5, seqs=2)
    damaged = directory / "counter_archive.db"
    damaged.write_bytes(struct.pack("i", 64) + b"\xff" * 60)
    (directory / f"counter_{os.getpid()}.db").touch()  # a process that has only just begun
    for _ in range(2):
        assert samples(collector.render())[TOKENS] == 5
    assert [r.getMessage() for r in caplog.records if "damaged" in r.getMessage()] == [
        f"{damaged} is damaged: its counts are missing from the metrics"
    ]


def test_metrics_are_served_on_a_port_until_closed(processes: Processes, directory: Path) -> None:
    processes.start("a", tokens=5, seqs=2)
    collector = NodeCollector(directory, "127.0.0.1", 0)
    port = collector.start()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        assert response.headers["Content-Type"].startswith("text/plain")
        assert samples(response.read())[TOKENS] == 5
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/")

    other = NodeCollector(directory.parent / "other", "127.0.0.1", port)
    with pytest.raises(SetupError, match=rf"127\.0\.0\.1:{port} .*in use.*choose another metrics_port"):
        other.start()
    other.close()

    collector.close()
    collector.close()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics")


def test_a_directory_has_one_collector(directory: Path) -> None:
    first = NodeCollector(directory, "127.0.0.1", 0)
    with pytest.raises(SetupError, match="another collector"):
        NodeCollector(directory, "127.0.0.1", 0)
    first.close()
    NodeCollector(directory, "127.0.0.1", 0).close()


def test_a_vanished_directory_gives_an_empty_scrape(directory: Path, collector: NodeCollector) -> None:
    shutil.rmtree(directory)
    assert collector.render() == b""


def test_without_the_variable_metrics_stay_in_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    registry = new_registry()
    IngressMetrics(registry).prompt_tokens(3)
    assert registry.get_sample_value("moecluster_prompt_tokens_total") == 3


def test_every_code_that_a_client_may_get_is_counted_from_the_start(registry):
    """Of the codes that errors of ours have; a series that appears with its first event is not seen by `rate`."""
    IngressMetrics(registry)
    counted = {
        sample.labels["outcome"]
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "moecluster_requests_total"
    }
    errors = [kind for kind in vars(cluster.errors).values() if isinstance(kind, type)]
    codes = {kind.grpc_code.lower() for kind in errors if issubclass(kind, cluster.errors.ClusterError)}
    assert codes <= counted
