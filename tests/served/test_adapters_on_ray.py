"""LoRA adapters of the served application: loaded while it runs, through deaths of its processes, and unloaded."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import grpc
import httpx2
import pytest
from lora_tools import write_adapter_of
from served_tools import wait_until

from cluster import LLM, SamplingParams
from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.runtime.names import NAMESPACE, controller_name

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PROMPT, NUM_TOKENS = list(range(40, 60)), 120


@pytest.fixture(scope="module")
def law(demo_checkpoint, tmp_path_factory):
    """An adapter of the demo's attention, shared expert and routed experts, and the tokens that an LLM has with it."""
    directory = tmp_path_factory.mktemp("adapters") / "law"
    with LLM(demo_checkpoint, dtype="float32", device="cpu", kv_cache_bytes=1 << 22) as llm:
        llm.load_adapter("law", write_adapter_of(directory, demo_checkpoint, "q_proj", "up_proj"))
        params = SamplingParams(temperature=0, repetition_penalty=1, max_tokens=NUM_TOKENS, ignore_eos=True)
        outputs = llm.generate([PROMPT, PROMPT], params, adapter=["law", ""])
    return directory, *(list(output.token_ids) for output in outputs)


@pytest.fixture
def change(application, served):
    """Makes a call of vLLM's with the admin key; returns its answer."""

    def post(call, **body):
        headers = {"authorization": f"Bearer {application.admin_key}"}
        return httpx2.post(f"{served.http_url}/v1/{call}", json=body, headers=headers, timeout=60)

    return post


def ask(stub, adapter):
    params = pb.SamplingParams(temperature=0, repetition_penalty=1, max_tokens=NUM_TOKENS, ignore_eos=True)
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT), sampling_params=params, adapter=adapter)
    return list(stub.Generate(request, timeout=90).token_ids)


def test_an_adapter_comes_and_goes_while_the_cluster_serves(served, stub, change, law):
    """By vLLM's calls, with an admin key; its part of the routed experts goes to the shards."""
    directory, adapted, plain = law
    assert adapted != plain
    missing = change("load_lora_adapter", lora_name="law", lora_path="/no/adapter")
    assert (missing.status_code, "is not a directory" in missing.text) == (400, True)
    assert change("load_lora_adapter", lora_name="law", lora_path=str(directory)).status_code == 200
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda name: ask(stub, name), ["law", ""] * 2)) == [adapted, plain] * 2
    assert change("unload_lora_adapter", lora_name="law").status_code == 200
    with pytest.raises(grpc.RpcError, match="the adapter 'law' is not served here; served: none"):
        ask(stub, "law")


def test_an_adapter_stays_while_processes_die(served, stub, change, law, ray_cluster):
    """A shard, an engine and the controller; their successors have the adapter, and no token is another one."""
    directory, adapted, plain = law
    assert change("load_lora_adapter", lora_name="law", lora_path=str(directory)).status_code == 200
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(ask, stub, ("law", "")[i % 2]) for i in range(8)]
        status = served.status()
        os.kill(status.shards[1].process.pid, signal.SIGKILL)
        os.kill(status.replicas[0].process.pid, signal.SIGKILL)
        assert [future.result() for future in running] == [adapted, plain] * 4
        controller = ray_cluster.get_actor(controller_name(served.group), namespace=NAMESPACE)
        ray_cluster.kill(controller, no_restart=False)
        gone = status.replicas[0].process.pid
        wait_until(lambda: engines_but(served, gone) == 2, "a new engine", timeout_s=90)
        wait_until(lambda: served.status().adapters == ("law",), "a new controller knows the adapter")
        assert list(pool.map(lambda name: ask(stub, name), ["law", ""] * 8)) == [adapted, plain] * 8
    assert change("unload_lora_adapter", lora_name="law").status_code == 200


def engines_but(served, pid):
    """The number of engines of other processes; 0 while the controller is away."""
    try:
        return sum(replica.process.pid != pid for replica in served.status().replicas)
    except Exception:  # noqa: BLE001 it is restarting
        return 0
