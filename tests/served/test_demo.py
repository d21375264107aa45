"""`moe-cluster demo` as a user meets it: a process of its own with a Ray of its own."""

import os
import re
import signal
import subprocess

import grpc
import pytest
from served_tools import check_health_reflection_and_streaming
from serving_tools import COMMAND

from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.pb.moecluster.v1 import inference_pb2_grpc

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_the_demo_shows_its_parts_and_ctrl_c_drains_and_stops_it():
    """With Serve's own proxy in front, where the session's cluster has HAProxy, and with a dead http_proxy around."""
    surroundings = {name: value for name, value in os.environ.items() if name.lower() != "no_proxy"}
    dead = dict.fromkeys(("http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:1")
    demo = subprocess.Popen(
        [*COMMAND, "demo", "--keep", "--proxy", "serve", "--max-num-seqs", "2", "--max-waiting", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=surroundings | dead,
    )
    out = ""
    for line in demo.stdout:
        out += line
        if "Ctrl-C stops" in line:
            break
    for text in ("gRPC     127.0.0.1:", "metrics  http://127.0.0.1:", "0-31", "32-63", "assistant:"):
        assert text in out
    assert "Other copies compute its rows at once." in out
    assert 'moecluster_requests_total{outcome="stop"} 2.0' in out
    [port] = re.findall(r"gRPC     127.0.0.1:(\d+)", out)
    check_health_reflection_and_streaming(f"127.0.0.1:{port}")
    check_a_refused_stream_hears_when_to_come_again(f"127.0.0.1:{port}")
    demo.send_signal(signal.SIGINT)
    rest, err = demo.communicate(timeout=90)
    assert demo.returncode == 0, err
    assert "stopped" in rest
    assert "Traceback" not in out + rest + err


def check_a_refused_stream_hears_when_to_come_again(address):
    """The engine has room for two."""
    with grpc.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        params = pb.SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
        calls = [stub.GenerateStream(pb.GenerateStreamRequest(text="a", sampling_params=params)) for _ in range(8)]
        refused = []
        for call in calls:
            try:
                next(call)
            except grpc.RpcError as error:
                refused.append((error.code().name, dict(error.trailing_metadata()).get("grpc-retry-pushback-ms")))
        for call in calls:
            call.cancel()
    assert refused
    assert {code for code, _ in refused} == {"RESOURCE_EXHAUSTED"}
    assert all(100 <= int(hint) <= 60_000 for _, hint in refused)
