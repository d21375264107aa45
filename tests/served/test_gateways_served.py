"""The protocols of gateways and of KServe's clients on the served application: tokens and texts are those of ours."""

import io
import os
import threading
import zipfile
from pathlib import Path

import grpc
import pytest
import transformers
from client_tools import run, with_clients
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from served_tools import scrape, wait_until

from cluster.pb.inference import grpc_service_pb2 as kserve
from cluster.pb.inference import grpc_service_pb2_grpc
from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.pb.smg.grpc.common import common_pb2
from cluster.pb.vllm.grpc.engine import vllm_engine_pb2 as vllm
from cluster.pb.vllm.grpc.engine import vllm_engine_pb2_grpc

pytestmark = pytest.mark.ray
LONG = 2000
TEXT = "Which experts answered?"


@pytest.fixture
def engine(channel):
    return vllm_engine_pb2_grpc.VllmEngineStub(channel)


@pytest.fixture
def ours(stub):
    """Our own protocol's twelve likeliest tokens after TEXT."""
    params = pb.SamplingParams(temperature=0, repetition_penalty=1, max_tokens=12, ignore_eos=True)
    return stub.Generate(pb.GenerateRequest(text=TEXT, sampling_params=params))


def asked(prompt, max_tokens=12, **given):
    params = vllm.SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return vllm.GenerateRequest(tokenized=vllm.TokenizedInput(input_ids=prompt), sampling_params=params, **given)


def test_a_gateways_tokens_are_those_of_our_protocol(engine, stub, ours):
    prompt = stub.Tokenize(pb.TokenizeRequest(text=TEXT)).token_ids
    [whole] = engine.Generate(asked(prompt))
    assert list(whole.complete.output_ids) == list(ours.token_ids)
    *chunks, last = engine.Generate(asked(prompt, stream=True))
    assert [token_id for c in chunks for token_id in c.chunk.token_ids] == list(ours.token_ids)
    assert (last.complete.finish_reason, last.complete.prompt_tokens) == ("length", len(prompt))


def test_a_prompts_log_probabilities_are_those_of_our_protocol(engine, stub):
    prompt = stub.Tokenize(pb.TokenizeRequest(text=TEXT)).token_ids
    params = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    for given in ({"tokenized": vllm.TokenizedInput(input_ids=prompt)}, {"text": TEXT}):
        [whole] = engine.Generate(vllm.GenerateRequest(sampling_params=params, **given))
        scores = whole.complete.input_logprobs
        assert list(scores.token_ids) == list(prompt)
        expected = stub.Score(pb.ScoreRequest(token_ids=pb.TokenIds(ids=prompt))).logprobs
        assert [one.value for one in scores.token_logprobs[1:]] == pytest.approx(list(expected), abs=1e-5)
        assert [len(top.values) for top in scores.top_logprobs] == [0] + [1] * (len(prompt) - 1)


def test_the_tokenizer_that_a_gateway_gets_is_the_models(engine, stub, tmp_path, demo_checkpoint):
    data = b"".join(chunk.data for chunk in engine.GetTokenizer(common_pb2.GetTokenizerRequest()))
    zipfile.ZipFile(io.BytesIO(data)).extractall(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer(TEXT).input_ids == list(stub.Tokenize(pb.TokenizeRequest(text=TEXT)).token_ids)
    theirs = transformers.AutoTokenizer.from_pretrained(demo_checkpoint)
    assert tokenizer.chat_template == theirs.chat_template


def test_an_abort_at_any_ingress_ends_the_callers_requests_alone(engine, served):
    mine, others = (("x-client-id", "me"),), (("x-client-id", "you"),)
    streams = {
        name: engine.Generate(asked([5, 6], LONG, stream=True, request_id=name), metadata=metadata)
        for name, metadata in (("a", mine), ("b", mine), ("c", others))
    }
    for stream in streams.values():
        next(stream)
    engine.Abort(vllm.AbortRequest(request_ids=["a", "c", "none"]), metadata=mine)
    assert list(streams["a"])[-1].complete.finish_reason == "abort"
    for name in ("b", "c"):
        next(streams[name])
        streams[name].cancel()
    wait_until(lambda: scrape(served)["moecluster_engine_kv_used_blocks"] == 0, "blocks are free")


def test_loads_and_limits_are_sums_over_the_replicas(engine):
    info = engine.GetModelInfo(vllm.GetModelInfoRequest())
    assert (info.served_model_name, info.model_type, info.max_context_length) == ("demo-moe", "qwen2_moe", 4096)
    assert list(info.architectures) == ["Qwen2MoeForCausalLM"]
    assert engine.HealthCheck(vllm.HealthCheckRequest()).healthy
    wait_until(lambda: engine.GetServerInfo(vllm.GetServerInfoRequest()).max_num_seqs == 32, "both replicas")
    [load] = engine.GetLoads(vllm.GetLoadsRequest()).loads
    assert (load.max_running_requests, load.dp_rank) == (32, 0)
    assert load.max_total_num_tokens > 0


def test_kserves_stream_is_answered_side_by_side_and_leaves_with_its_client(channel, ours, served):
    stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)

    def infer(name, max_tokens, **more):
        request = kserve.ModelInferRequest(model_name="demo-moe", id=name, **more)
        request.parameters["temperature"].int64_param = 0
        request.parameters["repetition_penalty"].int64_param = 1
        request.parameters["max_tokens"].int64_param = max_tokens
        request.parameters["ignore_eos"].bool_param = True
        prompt = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
        prompt.contents.bytes_contents.append(TEXT.encode())
        request.inputs.add(name="stream", datatype="BOOL", shape=[1]).contents.bool_contents.append(True)
        return request

    found = {"a": "", "b": ""}
    for response in stub.ModelStreamInfer(iter([infer("a", 12), infer("b", 12)])):
        assert not response.error_message
        piece = response.infer_response
        found[piece.id] += piece.outputs[0].contents.bytes_contents[0].decode()
    assert found == {"a": ours.text, "b": ours.text}

    def open_for_long():
        yield infer("long", LONG)
        asked_for.wait()

    asked_for = threading.Event()
    call = stub.ModelStreamInfer(open_for_long())
    next(call)
    call.cancel()
    asked_for.set()
    wait_until(lambda: scrape(served)["moecluster_engine_kv_used_blocks"] == 0, "blocks are free")


def test_reflection_lists_the_protocols(channel):
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    [answer] = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]))
    names = {service.name for service in answer.list_services_response.service}
    assert {"vllm.grpc.engine.VllmEngine", "inference.GRPCInferenceService"} <= names


def test_events_of_the_cache_are_unimplemented(engine):
    with pytest.raises(grpc.RpcError) as raised:
        list(engine.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest()))
    assert raised.value.code() == grpc.StatusCode.UNIMPLEMENTED


@with_clients
def test_tritons_client(served, ours):
    script = Path(__file__).resolve().parents[1] / "clients" / "triton_calls.py"
    run(os.environ["CLIENTS"], script, f"127.0.0.1:{served.grpc_port}", "demo-moe", TEXT, ours.text)
