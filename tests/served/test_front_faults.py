"""The served cluster's HAProxy, and Serve's manager of it, killed under clients that try again after UNAVAILABLE."""

import json
import os
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from urllib.request import Request, urlopen

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from served_tools import scrape, wait_until
from test_listening import family

from cluster.client.http_streams import HttpStreams
from cluster.errors import Unavailable
from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.pb.moecluster.v1 import inference_pb2_grpc
from cluster.process_identity import parent_of
from cluster.types import SAMPLING_DEFAULTS, SamplingParams

pytestmark = [pytest.mark.ray]

COMPUTED = "moecluster_engine_step_tokens_total"  # by engines, whoever is still there to get them


def command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
    except OSError:
        return ""


def processes(word):
    return [pid for pid in family(os.getpid()) if word in command(pid)]


def haproxies():
    return [pid for pid in family(os.getpid()) if command(pid).partition(" ")[0].endswith("/haproxy")]


class Caller(threading.Thread):
    """Asks for tokens again and again on one channel."""

    def __init__(self, port):
        super().__init__()
        options = [("grpc.initial_reconnect_backoff_ms", 20), ("grpc.max_reconnect_backoff_ms", 50)]
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}", options)
        self.codes, self.longest_s, self.ended = Counter(), 0.0, threading.Event()

    def run(self):
        stub = inference_pb2_grpc.InferenceServiceStub(self.channel)
        request = pb.GenerateStreamRequest(text="Hello", sampling_params=pb.SamplingParams(max_tokens=2))
        answered = time.monotonic()
        while not self.ended.is_set():
            try:
                list(stub.GenerateStream(request, timeout=60))
                self.codes["OK"] += 1
                now = time.monotonic()
                self.longest_s, answered = max(self.longest_s, now - answered), now
            except grpc.RpcError as error:
                self.codes[error.code().name] += 1
                time.sleep(0.005)

    def goes_on(self):
        before = self.codes["OK"]
        wait_until(lambda: self.codes["OK"] > before + 2, "answers", 60)


@pytest.fixture
def caller(served):
    caller = Caller(served.grpc_port)
    caller.start()
    caller.goes_on()
    yield caller
    caller.ended.set()
    caller.join()
    caller.channel.close()


def keepers():
    """The processes that Serve regards as HAProxy; each has one child of the same name."""
    pids = processes("moe-cluster-haproxy")
    return [pid for pid in pids if parent_of(pid) not in pids]


@pytest.mark.parametrize("who", ["HAProxy", "its supervisor"])
def test_a_killed_front_is_there_again_before_serve_looks(served, caller, who):
    """Serve's manager, which would need seconds for it, lives on and reloads as before."""
    managers, kept = processes("ray::HAProxyManager"), keepers()

    def victims():
        return haproxies() if who == "HAProxy" else set(processes("moe-cluster-haproxy")) - set(keepers())

    for killed in victims():
        before = haproxies()
        os.kill(killed, signal.SIGKILL)
        caller.goes_on()
        assert killed not in victims()
        assert haproxies() != before
    assert set() < set(keepers()) <= set(kept)  # one before a reload may go meanwhile
    assert processes("ray::HAProxyManager") == managers
    assert set(caller.codes) <= {"OK", "UNAVAILABLE"}
    os.write(1, f"{who} killed: {caller.longest_s:.3f} s without an answer, {dict(caller.codes)}\n".encode())


@pytest.mark.slow
@pytest.mark.parametrize("who", ["manager", "keeper"])
def test_the_manager_or_the_keeper_killed_costs_no_call(served, caller, who):
    """Its HAProxy serves on until the next manager knows the application; streams go on, too."""
    stub = health_pb2_grpc.HealthStub(caller.channel)
    watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=120)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    (manager,), before = processes("ray::HAProxyManager"), processes("moe-cluster-haproxy")
    os.kill(manager if who == "manager" else keepers()[-1], signal.SIGKILL)
    wait_until(lambda: manager not in processes("ray::HAProxyManager"), "the manager's end", 60)
    wait_until(lambda: processes("ray::HAProxyManager"), "another manager", 60)
    caller.goes_on()
    wait_until(lambda: set(processes("moe-cluster-haproxy")) - set(before), "another HAProxy", 60)
    caller.goes_on()
    time.sleep(3)  # reloads, as Serve learns the applications
    caller.goes_on()
    assert not watch.done(), (watch.code(), watch.details())
    watch.cancel()
    assert caller.codes.keys() == {"OK"}


def ingresses():
    return processes("ray::ServeReplica:moe-cluster:Ingress")


@pytest.mark.slow
def test_a_killed_ingress_leaves_no_gap(served, caller):
    """HAProxy resets its streams, CANCELLED for those that have begun, and passes further calls to another ingress."""
    before = ingresses()
    assert len(before) == 2
    health, states = health_pb2_grpc.HealthStub(caller.channel), set()

    def is_followed():
        with suppress(grpc.RpcError):  # counted by the caller
            states.add(health.Check(health_pb2.HealthCheckRequest(), timeout=60).status)
        return len(set(ingresses()) - {before[0]}) == 2

    os.kill(before[0], signal.SIGKILL)
    caller.goes_on()
    wait_until(is_followed, "another ingress", 60)
    for _ in range(50):
        is_followed()
        time.sleep(0.05)
    caller.goes_on()
    assert states == {health_pb2.HealthCheckResponse.SERVING}
    assert caller.codes.keys() <= {"OK", "UNAVAILABLE", "CANCELLED"}
    assert caller.codes.total() - caller.codes["OK"] <= 1
    os.write(1, f"ingress killed: {caller.longest_s:.3f} s without an answer, {dict(caller.codes)}\n".encode())


@pytest.mark.slow
def test_a_killed_ingress_ends_its_own_http_streams_alone(served):
    """Its clients see that their streams are not whole; calls of which nothing has come yet go to another ingress. The
    sequences of the broken streams end long before their last token."""
    asker, before, computed = HttpStreams(served.http_url), ingresses(), scrape(served)[COMPUTED]
    assert len(before) == 2
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=900).with_defaults(SAMPLING_DEFAULTS)
    begun, outcomes = threading.Barrier(9, timeout=60), Counter()

    def stream():
        num_tokens = 0
        try:
            for piece in asker.stream([1, 2, 3], params):
                if not num_tokens:
                    begun.wait()
                num_tokens += len(piece.token_ids)
            outcomes["whole" if num_tokens == 900 else "short"] += 1
        except Unavailable:
            outcomes["broken"] += 1

    def whole_answers():
        """Answers that are not streamed: nothing of them is sent before their end."""
        body = {"prompt": [1, 2, 3], "max_tokens": 60, "temperature": 0, "ignore_eos": True, "user": "u" * 20_000}
        request = Request(
            f"{served.http_url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urlopen(request, timeout=120) as answer:
            return answer.status

    threads = [threading.Thread(target=stream) for _ in range(8)]
    for thread in threads:
        thread.start()
    begun.wait()
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(whole_answers) for _ in range(12)]
        time.sleep(0.3)
        os.kill(before[0], signal.SIGKILL)
        assert {answer.result(120) for answer in answers} == {200}
    for thread in threads:
        thread.join(120)
    assert set(outcomes) <= {"whole", "broken"}
    assert outcomes.total() == 8
    assert 0 < outcomes["broken"] < 8
    wait_until(lambda: scrape(served)["moecluster_engine_running_sequences"] == 0, "no sequence runs")
    computed = scrape(served)[COMPUTED] - computed
    assert computed < 900 * outcomes["whole"] + 500 * outcomes["broken"] + 60 * len(answers) * 2
    wait_until(lambda: len(set(ingresses()) - {before[0]}) == 2, "another ingress", 60)
    os.write(1, f"ingress killed under HTTP streams: {dict(outcomes)}\n".encode())


@pytest.mark.slow
def test_odd_bytes_in_a_header_that_serve_reads_are_no_error(served):
    for value in ("\xff\xfe", "a\xe4"):
        headers = {"x-request-id": value, "traceparent": value, "content-type": "application/json"}
        body = json.dumps({"prompt": [1, 2], "max_tokens": 1}).encode()
        with urlopen(Request(f"{served.http_url}/v1/completions", body, headers), timeout=60) as answer:
            assert answer.status == 200
