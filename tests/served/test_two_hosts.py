"""Experts on another host: two raylets in network namespaces of their own, joined by a pair of virtual interfaces."""

import json
import os
import shutil
import subprocess
import sys
import uuid

import pytest

from cluster import LLM, SamplingParams

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(
        shutil.which("ip") is None or os.geteuid() != 0, reason="network namespaces need root and iproute2"
    ),
]

PROMPTS = [[1, 2, 3], [9, 8, 7, 6, 5], list(range(40))]
DRIVER = """
import json, sys
import ray
from cluster import LLM, SamplingParams
from cluster.runtime.protocol import NAMESPACE
address, model_dir, prompts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
ray.init(address=address, namespace=NAMESPACE, log_to_driver=False)
with LLM(model_dir, num_expert_shards=2, transport="stream", kv_cache_bytes=1 << 22, skip_tokenizer=True) as llm:
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
    connections = llm.experts.transport._connections.values()
    families = [connection._sock.family.name for _, connection in connections]
print(json.dumps({"tokens": [list(output.token_ids) for output in outputs], "families": families}))
"""


@pytest.fixture
def hosts(tmp_path):
    """Runs a command on host 0 (Ray's head, without room for actors) or 1 (where they go)."""
    name, net = uuid.uuid4().hex[:6], f"10.{os.getpid() % 200 + 20}.77"
    spaces = [f"moe-{name}-{i}" for i in range(2)]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}

    def ip(*arguments):
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    def command(host, *arguments, **options):
        options = {"env": environment, "capture_output": True, "text": True, "timeout": 120, **options}
        return subprocess.run(["ip", "netns", "exec", spaces[host], *arguments], check=False, **options)

    temp_dirs = [f"/tmp/moe-{name}-{i}" for i in range(2)]  # short: Ray's sockets lie below
    try:
        for space in spaces:
            ip("netns", "add", space)
        ip(
            "link",
            "add",
            f"v{name}0",
            "netns",
            spaces[0],
            "type",
            "veth",
            "peer",
            "name",
            f"v{name}1",
            "netns",
            spaces[1],
        )
        for i, space in enumerate(spaces):
            ip("-n", space, "addr", "add", f"{net}.{i + 1}/24", "dev", f"v{name}{i}")
            ip("-n", space, "link", "set", f"v{name}{i}", "up")
            ip("-n", space, "link", "set", "lo", "up")
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--object-store-memory=100000000"]
        head = ["--head", "--num-cpus=0", f"--node-ip-address={net}.1", "--port=6399", "--include-dashboard=false"]
        joined = [f"--address={net}.1:6399", "--num-cpus=4", f"--node-ip-address={net}.2"]
        for i, arguments in enumerate((head, joined)):
            done = command(i, *ray, *arguments, *([f"--temp-dir={temp_dirs[0]}"] if i == 0 else []))
            assert done.returncode == 0, done.stdout + done.stderr
        yield f"{net}.1:6399", command
    finally:
        for space in spaces:
            found = subprocess.run(["ip", "netns", "pids", space], check=False, capture_output=True, text=True)
            for pid in found.stdout.split():
                subprocess.run(["kill", "-9", pid], check=False, capture_output=True)
            subprocess.run(["ip", "netns", "delete", space], check=False, capture_output=True)
        for temp_dir in temp_dirs:
            shutil.rmtree(temp_dir, ignore_errors=True)


def test_experts_on_another_host_give_the_same_tokens_over_tcp(hosts, demo_checkpoint, tmp_path):
    address, command = hosts
    with LLM(demo_checkpoint, kv_cache_bytes=1 << 22, skip_tokenizer=True) as llm:
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        expected = [list(output.token_ids) for output in llm.generate(PROMPTS, params)]
    done = command(0, sys.executable, "-c", DRIVER, address, str(demo_checkpoint), json.dumps(PROMPTS))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["tokens"] == expected
    assert result["families"] == ["AF_INET", "AF_INET"]
    file = tmp_path / "transport.json"
    bench = [sys.executable, "-m", "cluster.cli", "bench", "transport", "--ray-address", address, "--json", str(file)]
    done = command(0, *bench, "--rows", "8", "--repeat", "20")
    assert done.returncode == 0, done.stderr
    assert {entry["carrier"] for entry in json.loads(file.read_text())} == {"ray", "stream, TCP"}
