"""`inference.GRPCInferenceService` over a service whose answers are known by hand: an answer is its own prompt."""

import asyncio
import json
import struct

import grpc
import pytest
from gateway_tools import infer_request, serve
from serving_fakes import EchoBackend, write_tokenizer

from cluster.pb.inference import grpc_service_pb2 as pb
from cluster.serving.admission.api_keys import ApiKeys, new_key
from cluster.serving.text.tokenizer import Tokenizer
from cluster.types import SamplingParams


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def texts(response, name):
    """The elements of a raw tensor of BYTES."""
    index = [output.name for output in response.outputs].index(name)
    data, found = response.raw_output_contents[index], []
    while data:
        end = 4 + int.from_bytes(data[:4], "little")
        found.append(data[4:end].decode())
        data = data[end:]
    return found


def number(response, name):
    index = [output.name for output in response.outputs].index(name)
    return int.from_bytes(response.raw_output_contents[index], "little")


def one(tokenizer, request, backend=None, **service):
    return serve(lambda served: served.kserve.ModelInfer(request), tokenizer, backend, **service)


def test_an_answer_begins_with_its_prompt_unless_the_request_excludes_it(tokenizer):
    assert texts(one(tokenizer, infer_request("he")), "text_output") == ["hehe"]
    response = one(tokenizer, infer_request("he", exclude_input_in_output=True, request_id="mine"))
    assert texts(response, "text_output") == ["he"]
    assert (response.id, response.model_name, response.model_version) == ("mine", "tiny", "1")
    assert [(o.name, o.datatype, list(o.shape)) for o in response.outputs] == [("text_output", "BYTES", [1])]


def test_contents_are_answered_with_contents(tokenizer):
    response = one(tokenizer, infer_request("he", raw=False, return_num_input_tokens=True))
    assert response.outputs[0].contents.bytes_contents == [b"hehe"]
    assert response.outputs[1].contents.uint_contents == [1]
    assert not response.raw_output_contents


def test_further_outputs_come_where_they_are_asked_for(tokenizer):
    """The answer to "hello", one token (259), is that token and EOS (261); log-probabilities are minus their ids."""
    request = infer_request(
        return_finish_reason=True, return_num_input_tokens=True, return_num_output_tokens=True, return_logprobs=True,
        return_cumulative_logprob=True,
    )  # fmt: skip
    response = one(tokenizer, request)
    assert texts(response, "finish_reason") == ["stop"]
    assert (number(response, "num_input_tokens"), number(response, "num_output_tokens")) == (1, 2)
    [entries] = map(json.loads, texts(response, "logprobs"))
    assert entries == [
        {"259": {"logprob": -259.0, "rank": 1, "decoded_token": "hello"}},
        {"261": {"logprob": -261.0, "rank": 1, "decoded_token": "<|im_end|>"}},
    ]
    named = [output.name for output in response.outputs]
    assert struct.unpack("<f", response.raw_output_contents[named.index("cumulative_logprob")]) == (-520.0,)
    request.outputs.add(name="finish_reason")
    assert [output.name for output in one(tokenizer, request).outputs] == ["finish_reason"]


@pytest.mark.parametrize("as_tensor", [True, False])
def test_sampling_parameters_come_as_json_or_as_parameters_and_numbers_may_be_texts(tokenizer, as_tensor):
    given = {"temperature": "0.1", "top_p": "0.95", "max_tokens": "1", "ignore_eos": "true", "seed": 7}
    backend = EchoBackend()
    tensors = {"sampling_parameters": json.dumps(given)} if as_tensor else {"parameters": given}
    one(tokenizer, infer_request(**tensors), backend)
    [request] = backend.requests
    params = request.params
    assert (params.temperature, params.top_p, params.max_tokens, params.ignore_eos) == (0.1, 0.95, 1, True)
    assert (params.seed, params.top_k) == (7, 20)  # the checkpoint's where the request has none


def test_n_gives_several_outputs_and_lora_name_an_adapter(tokenizer):
    backend = EchoBackend()
    request = infer_request("he", sampling_parameters='{"n": 2, "lora_name": "sql", "seed": 3}')
    assert texts(one(tokenizer, request, backend, adapters=["sql"]), "text_output") == ["hehe", "hehe"]
    assert [(r.adapter, r.params.seed) for r in backend.requests] == [("sql", 3), ("sql", 4)]


def test_an_alias_and_an_adapter_are_models(tokenizer):
    backend = EchoBackend()
    for model in ("also", "sql"):
        one(tokenizer, infer_request("he", model=model), backend, adapters=["sql"], view={"aliases": ("also",)})
    assert [request.adapter for request in backend.requests] == ["", "sql"]


REFUSED = {
    "another model": (infer_request(model="other"), grpc.StatusCode.NOT_FOUND, "'other'"),
    "no prompt": (pb.ModelInferRequest(model_name="tiny"), grpc.StatusCode.INVALID_ARGUMENT, "text_input"),
    "a stream": (infer_request(stream=True), grpc.StatusCode.INVALID_ARGUMENT, "ModelStreamInfer"),
    "a picture": (infer_request(image=b"x"), grpc.StatusCode.INVALID_ARGUMENT, "'image' is unknown"),
    "no JSON": (infer_request(sampling_parameters="{"), grpc.StatusCode.INVALID_ARGUMENT, "no JSON"),
    "an unknown parameter": (infer_request(sampling_parameters='{"x": 1}'), grpc.StatusCode.INVALID_ARGUMENT, "'x'"),
    "a value out of range": (
        infer_request(sampling_parameters='{"top_p": 2}'), grpc.StatusCode.INVALID_ARGUMENT, "top_p is 2"),
    "a text in place of a number": (
        infer_request(sampling_parameters='{"top_p": "much"}'), grpc.StatusCode.INVALID_ARGUMENT, "top_p is 'much'"),
    "both kinds of parameters": (
        infer_request(sampling_parameters="{}", parameters={"seed": 1}), grpc.StatusCode.INVALID_ARGUMENT, "'seed'"),
    "a sequence": (infer_request(parameters={"sequence_id": 4}), grpc.StatusCode.INVALID_ARGUMENT, "'sequence_id'"),
    "no UTF-8": (infer_request(b"a\xff"), grpc.StatusCode.INVALID_ARGUMENT, "byte 1 is 0xff"),
    "too many outputs": (infer_request(parameters={"n": 129}), grpc.StatusCode.INVALID_ARGUMENT, "n is 129"),
    "a name with a space": (infer_request(request_id="a b"), grpc.StatusCode.INVALID_ARGUMENT, "request_id"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_by_name(tokenizer, case):
    request, code, reason = REFUSED[case]
    with pytest.raises(grpc.aio.AioRpcError, match=reason) as raised:
        one(tokenizer, request)
    assert raised.value.code() == code


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: r.inputs[0].shape.append(2), r"shape \[1, 2\]"),
        (lambda r: setattr(r.inputs[0], "datatype", "INT8"), "BYTES is needed"),
        (lambda r: r.raw_input_contents.append(b""), "2 entries"),
        (lambda r: r.raw_input_contents.__setitem__(0, b"\x09\0\0\0a"), "5 raw bytes"),
        (lambda r: r.inputs[0].parameters["shared_memory_region"].SetInParent(), "shared_memory_region"),
        (lambda r: r.outputs.add(name="x"), "output 'x'"),
        (lambda r: setattr(r, "model_version", "2"), "version '2'"),
    ],
)
def test_damaged_tensors_are_refused(tokenizer, change, reason):
    request = infer_request()
    change(request)
    with pytest.raises(grpc.aio.AioRpcError, match=reason):
        one(tokenizer, request)


async def _all(call):
    return [response async for response in call]


def streamed(tokenizer, *requests, backend=None, **service):
    return serve(lambda served: _all(served.kserve.ModelStreamInfer(iter(requests))), tokenizer, backend, **service)


def test_a_stream_answers_in_pieces_the_last_of_which_says_so(tokenizer):
    """The bytes of "abc" are three tokens; EOS comes with none of text."""
    request = infer_request("abc", stream=True, return_finish_reason=True, return_num_input_tokens=True)
    pieces = [r.infer_response for r in streamed(tokenizer, request)]
    assert "".join(texts(piece, "text_output")[0] for piece in pieces) == "abc"
    assert [texts(piece, "finish_reason") for piece in pieces] == [["None"]] * 3 + [["stop"]]
    assert [p.parameters["triton_final_response"].bool_param for p in pieces] == [False] * 3 + [True]
    assert [number(piece, "num_input_tokens") for piece in pieces] == [3] * 4


def test_requests_of_one_stream_are_answered_side_by_side_and_one_that_fails_leaves_the_others(tokenizer):
    requests = [
        infer_request("abc", stream=True, request_id="a"), infer_request("he", request_id="b"),
        infer_request("x", model="other", request_id="c"),
    ]  # fmt: skip
    found = {}
    for response in streamed(tokenizer, *requests):
        found.setdefault(response.infer_response.id, []).append(response)
    assert "".join(texts(r.infer_response, "text_output")[0] for r in found["a"]) == "abc"
    assert [texts(r.infer_response, "text_output") for r in found["b"]] == [["hehe"]]
    [refused] = found["c"]
    assert "the model 'other' is not served here" in refused.error_message


def test_leaving_a_stream_ends_its_sequences(tokenizer):
    async def scenario(served):
        call = served.kserve.ModelStreamInfer()
        for name in ("a", "b"):
            await call.write(infer_request(stream=True, request_id=name))
        while len(served.backend.requests) < 2:
            await asyncio.sleep(0.01)
        call.cancel()
        while len(served.backend.closed) < 2:
            await asyncio.sleep(0.01)
        return sorted(served.backend.closed)

    assert serve(scenario, tokenizer, EchoBackend(hang=True)) == ["a", "b"]


def test_timeout_is_a_budget_in_microseconds(tokenizer):
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        one(tokenizer, infer_request(parameters={"timeout": 20_000}), EchoBackend(hang=True))
    assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


def test_health_and_metadata(tokenizer):
    async def scenario(served):
        stub, found = served.kserve, []
        found.append((await stub.ServerLive(pb.ServerLiveRequest())).live)
        found.append((await stub.ServerReady(pb.ServerReadyRequest())).ready)
        for name in ("tiny", "other"):
            found.append((await stub.ModelReady(pb.ModelReadyRequest(name=name))).ready)
        served.ingress.health.set(False)
        found.append((await stub.ServerReady(pb.ServerReadyRequest())).ready)
        server = await stub.ServerMetadata(pb.ServerMetadataRequest())
        model = await stub.ModelMetadata(pb.ModelMetadataRequest(name="tiny"))
        return found, server, model

    found, server, model = serve(scenario, tokenizer, defaults=SamplingParams())
    assert found == [True, True, True, False, False]
    assert server.name == "moe-cluster"
    assert {t.name: (t.datatype, list(t.shape)) for t in model.outputs}["num_input_tokens"] == ("UINT32", [1])
    assert {t.name for t in model.inputs} >= {"text_input", "stream", "sampling_parameters"}


def test_all_but_health_needs_a_key_where_keys_are_asked_for(tokenizer, tmp_path):
    key, line = new_key("team")
    (tmp_path / "keys").write_text(line)

    async def scenario(served):
        assert (await served.kserve.ServerLive(pb.ServerLiveRequest())).live
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await served.kserve.ModelInfer(infer_request())
        assert raised.value.code() == grpc.StatusCode.UNAUTHENTICATED
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await _all(served.kserve.ModelStreamInfer(iter([infer_request()])))
        assert raised.value.code() == grpc.StatusCode.UNAUTHENTICATED
        metadata = (("authorization", f"Bearer {key}"),)
        return await served.kserve.ModelInfer(infer_request("he"), metadata=metadata)

    response = serve(scenario, tokenizer, keys=ApiKeys(tmp_path / "keys", lambda: 0.0))
    assert texts(response, "text_output") == ["hehe"]
