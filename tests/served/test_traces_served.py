"""Traces of the served application, at a receiver of OTLP in this process."""

import json
import secrets
from itertools import count
from urllib.request import Request, urlopen

import pytest
from otlp_receiver import by_name
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from served_tools import MESSAGES, wait_until

from cluster.pb.inference import grpc_service_pb2 as kserve
from cluster.pb.inference import grpc_service_pb2_grpc
from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.pb.moecluster.v1 import inference_pb2_grpc
from cluster.pb.vllm.grpc.engine import vllm_engine_pb2 as vllm
from cluster.pb.vllm.grpc.engine import vllm_engine_pb2_grpc

pytestmark = pytest.mark.ray
CALLER = "00f067aa0ba902b7"
NUM_TOKENS = 6
_IDS = count(1)


def new_id():
    """Of a trace whose caller has it recorded."""
    return f"{secrets.token_hex(12)}{next(_IDS):08x}"


def traceparent(trace_id, flags="01"):
    return "traceparent", f"00-{trace_id}-{CALLER}-{flags}"


def question(text):
    params = pb.SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    return pb.GenerateRequest(text=text, sampling_params=params)


def is_whole(spans):
    """All spans under the caller's have come, down to the shards of the steps that have a span."""
    named = by_name(spans)
    dispatched = sum(len(found) for name, found in named.items() if name.startswith("dispatch to"))
    computed = sum(len(found) for name, found in named.items() if name.startswith("experts of"))
    return CALLER in {span.parent_id for span in spans} and computed == dispatched > 0


def _over_http(served, channel, trace_id):
    body = json.dumps({"model": "demo-moe", "max_tokens": 2, "messages": MESSAGES}).encode()
    headers = {"content-type": "application/json", **dict([traceparent(trace_id)])}
    urlopen(Request(f"{served.http_url}/v1/chat/completions", body, headers), timeout=60).read()


def _over_vllms(served, channel, trace_id):
    params = vllm.SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    asked = vllm.GenerateRequest(tokenized=vllm.TokenizedInput(input_ids=[5, 6]), sampling_params=params)
    list(vllm_engine_pb2_grpc.VllmEngineStub(channel).Generate(asked, metadata=[traceparent(trace_id)]))


def _over_kserves(served, channel, trace_id):
    asked = kserve.ModelInferRequest(model_name="demo-moe")
    text = asked.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    text.contents.bytes_contents.append(b"Which experts answered?")
    grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(asked, metadata=[traceparent(trace_id)])


def _over_ours(served, channel, trace_id):
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    stub.Generate(question("Which experts answered?"), metadata=[traceparent(trace_id)])


FRONTS = {  # the names of the call's span and the request's
    _over_ours: ("moecluster.v1.Generate", "text_completion demo-moe"),
    _over_http: ("POST /v1/chat/completions", "chat demo-moe"),
    _over_vllms: ("vllm.grpc.engine.Generate", "text_completion demo-moe"),
    _over_kserves: ("inference.ModelInfer", "text_completion demo-moe"),
}


def test_traces_lead_from_every_front_to_the_shards(served, channel, receiver):
    """Those that callers want; the shared application's ratio is 0."""
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    before, ids = {span.trace_id for span in receiver.spans}, {ask: new_id() for ask in FRONTS}
    stub.Generate(question("Which experts answered?"))
    stub.Generate(question("Which experts answered?"), metadata=[traceparent(new_id(), flags="00")])
    for ask, trace_id in ids.items():
        ask(served, channel, trace_id)
    for ask, trace_id in ids.items():
        spans = receiver.trace(trace_id, is_whole)
        assert is_whole(spans), spans
        named, (call, request) = by_name(spans), FRONTS[ask]
        assert [span.parent_id for span in named[call]] == [CALLER]
        assert [span.parent_id for span in named[request]] == [named[call][0].span_id]
        assert len(named["engine"]) == 1
    assert {span.trace_id for span in receiver.spans} - before == set(ids.values())
    _check_tree(receiver.trace(ids[_over_ours], is_whole))
    _check_exemplars(served, set(ids.values()))


def _check_tree(spans):
    """Of NUM_TOKENS tokens, each of which was a step with a span."""
    by_id, named = {span.span_id: span for span in spans}, by_name(spans)
    assert {span.role for span in spans} == {"ingress", "attention-replica", "engine", "shard"}

    def above(span):
        return by_id[span.parent_id].name

    [request] = named["text_completion demo-moe"]
    assert request.attributes["gen_ai.usage.output_tokens"] == NUM_TOKENS
    assert request.attributes["gen_ai.response.finish_reasons"] == ["length"]
    for child, parent in (
        ("attention replica", request.name), ("engine", "attention replica"), ("queue", "engine"),
        ("prefill", "engine"), ("decode", "engine"),
    ):  # fmt: skip
        [span] = named[child]
        assert above(span) == parent
        assert by_id[span.parent_id].began <= span.began <= span.ended
    steps = named["step"]
    assert [above(step) for step in steps] == ["prefill", *["decode"] * (NUM_TOKENS - 1)]
    for shard_id in range(2):
        crossings, products = named[f"dispatch to shard {shard_id}"], named[f"experts of shard {shard_id}"]
        assert {span.parent_id for span in crossings} <= {step.span_id for step in steps}
        assert {span.parent_id for span in products} == {span.span_id for span in crossings}
        rows = {span.span_id: span.attributes["moecluster.rows"] for span in crossings}
        assert all(span.attributes["moecluster.rows"] == rows[span.parent_id] for span in products)
        assert {span.resource["moecluster.shard_id"] for span in products} == {str(shard_id)}


def _check_exemplars(served, trace_ids):
    """Latencies on the metrics page name traces."""
    wait_until(lambda: served.status().metrics_addresses, "the metrics are served")
    accept = {"accept": "application/openmetrics-text; version=1.0.0"}
    text = urlopen(Request(served.status().metrics_addresses[0], headers=accept), timeout=60).read().decode()
    exemplars = {
        sample.name: sample.exemplar
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.exemplar is not None and sample.exemplar.labels["trace_id"] in trace_ids
    }
    assert exemplars.keys() == {
        "moecluster_time_to_first_token_seconds_bucket",
        "moecluster_request_duration_seconds_bucket",
    }
    assert all(exemplar.value > 0 for exemplar in exemplars.values())
