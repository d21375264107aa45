"""The served application, called by a plain grpcio client."""

import json
import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from served_tools import scrape, wait_until

from cluster import LLM, SamplingParams
from cluster.pb.moecluster.v1 import inference_pb2 as pb

pytestmark = pytest.mark.ray

SERVICE = "moecluster.v1.InferenceService"


def greedy(max_tokens, **more):
    return pb.SamplingParams(temperature=0, repetition_penalty=1, max_tokens=max_tokens, ignore_eos=True, **more)


@pytest.fixture(scope="module")
def expected(demo_checkpoint):
    """Greedy tokens of ten prompts, from the same model in one process."""
    prompts = [
        list(range(start, start + length)) for start, length in zip(range(0, 100, 10), range(1, 31, 3), strict=True)
    ]
    with LLM(demo_checkpoint, dtype="float32", kv_cache_bytes=4 << 20) as llm:
        outputs = llm.generate(
            prompts, SamplingParams(temperature=0, repetition_penalty=1.0, max_tokens=12, ignore_eos=True)
        )
    return [(prompt, list(output.token_ids)) for prompt, output in zip(prompts, outputs, strict=True)]


def test_scores_and_embeddings_are_those_of_one_process(stub, demo_checkpoint):
    """Beside a stream of tokens."""
    prompts = [list(range(10, 60)), [7], list(range(200, 230))]
    with LLM(demo_checkpoint, dtype="float32", kv_cache_bytes=4 << 20) as llm:
        scores, vectors = llm.prompt_logprobs(prompts), llm.embed(prompts, pooling="mean")
    beside = stub.GenerateStream(pb.GenerateStreamRequest(text="a", sampling_params=greedy(64)))
    for prompt, score, vector in zip(prompts, scores, vectors, strict=True):
        token_ids = pb.TokenIds(ids=prompt)
        answer = stub.Score(pb.ScoreRequest(token_ids=token_ids))
        assert list(answer.logprobs) == pytest.approx(score.logprobs.tolist(), abs=1e-4)
        embedded = stub.Embed(pb.EmbedRequest(token_ids=token_ids, pooling=pb.POOLING_MEAN))
        assert list(embedded.embedding) == pytest.approx(vector.embedding.tolist(), abs=1e-4)
    assert sum(len(piece.token_ids) for piece in beside) == 64


def test_generate_gives_the_tokens_of_one_process(stub, expected):
    for prompt, token_ids in expected[:4]:
        answer = stub.Generate(
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling_params=greedy(12, logprobs=2))
        )
        assert list(answer.token_ids) == token_ids
        assert answer.finish_reason == pb.FINISH_REASON_LENGTH
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 12)
        assert [logprobs.token_id for logprobs in answer.logprobs] == token_ids
        assert all(len(entry.top) == 2 and entry.top[0].token_id == entry.token_id for entry in answer.logprobs)


def test_prompts_that_begin_alike_go_to_one_replica(stub):
    """16 prompts of 80 tokens, each asked and then gone on with its answer, of which the cache has 4 or 5 blocks of
    16. Ingresses tell one another what they have sent where, a moment later: on a busy machine some come before that.
    By load alone, of two replicas, 12 or more find theirs in 4 of 100 runs."""
    cached = []
    for number in range(16):
        prompt = [1 + (number * 31 + place * 7) % 200 for place in range(80)]
        for wait_s in (0.3, 0.0):
            answer = stub.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling_params=greedy(4)))
            cached.append(answer.usage.cached_tokens)
            prompt = [*prompt, *answer.token_ids]
            time.sleep(wait_s)
    assert sum(num in (64, 80) for num in cached[1::2]) >= 12, cached


def test_a_stream_brings_the_same_tokens_piece_by_piece_and_ends_with_usage(stub, expected):
    prompt, token_ids = expected[0]
    request = pb.GenerateStreamRequest(token_ids=pb.TokenIds(ids=prompt), sampling_params=greedy(12), request_id="mine")
    pieces = list(stub.GenerateStream(request))
    assert [token_id for piece in pieces for token_id in piece.token_ids] == token_ids
    assert pieces[0].request_id == "mine"
    assert len(pieces) > 2
    assert pieces[-1].finish_reason == pb.FINISH_REASON_LENGTH
    assert pieces[-1].usage.completion_tokens == 12
    assert not any(piece.finish_reason or piece.HasField("usage") for piece in pieces[:-1])


def test_32_streams_at_once_each_get_their_own_answer(stub, expected):
    def ask(index):
        prompt, token_ids = expected[index % len(expected)]
        request = pb.GenerateStreamRequest(token_ids=pb.TokenIds(ids=prompt), sampling_params=greedy(12))
        got = [token_id for piece in stub.GenerateStream(request) for token_id in piece.token_ids]
        return got == token_ids

    with ThreadPoolExecutor(32) as pool:
        assert all(pool.map(ask, range(32)))


def test_the_same_seed_gives_the_same_answer_alone_and_in_a_crowd(stub):
    request = pb.GenerateRequest(
        text="seeded", sampling_params=pb.SamplingParams(temperature=1.5, seed=7, max_tokens=16, ignore_eos=True)
    )
    alone = list(stub.Generate(request).token_ids)
    with ThreadPoolExecutor(12) as pool:
        noise = [
            pool.submit(stub.Generate, pb.GenerateRequest(text=f"n{i}", sampling_params=greedy(24))) for i in range(8)
        ]
        crowded = [pool.submit(stub.Generate, request) for _ in range(4)]
        assert [list(future.result().token_ids) for future in crowded] == [alone] * 4
        assert all(future.result() for future in noise)


def test_a_chat_is_rendered_with_the_checkpoints_template(stub):
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="hello")])
    tokens = stub.Tokenize(pb.TokenizeRequest(chat=chat))
    answer = stub.Generate(pb.GenerateRequest(chat=chat, sampling_params=greedy(4)))
    assert answer.usage.prompt_tokens == len(tokens.token_ids)
    text = stub.Detokenize(pb.DetokenizeRequest(token_ids=tokens.token_ids, skip_special_tokens=False)).text
    assert text.endswith("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")


def test_a_stop_string_ends_the_answer_before_it(stub, expected):
    prompt, token_ids = expected[1]
    whole = stub.Detokenize(pb.DetokenizeRequest(token_ids=token_ids)).text
    stop = whole[4:7]
    answer = stub.Generate(
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling_params=greedy(12, stop=[stop]))
    )
    assert answer.text == whole[: whole.index(stop)]
    assert answer.finish_reason == pb.FINISH_REASON_STOP


def test_model_info_describes_the_demo_checkpoint(stub):
    info = stub.GetModelInfo(pb.GetModelInfoRequest())
    assert (info.model_id, info.num_experts, info.dtype, info.max_model_len) == ("demo-moe", 64, "float32", 4096)


LONG = 2000  # tokens; at some 100 a second and stream, longer than any of these tests waits


def test_cancelling_a_stream_frees_its_blocks(stub, served):
    call = stub.GenerateStream(pb.GenerateStreamRequest(text="long", sampling_params=greedy(LONG)))
    next(call)
    assert scrape(served)["moecluster_engine_kv_used_blocks"] > 0
    call.cancel()
    wait_until(lambda: scrape(served)["moecluster_engine_kv_used_blocks"] == 0, "blocks are free after a cancel")
    assert scrape(served)["moecluster_engine_running_sequences"] == 0


def test_a_hundred_cancelled_streams_leak_no_block(stub, served):
    def ask_and_leave(index):
        call = stub.GenerateStream(pb.GenerateStreamRequest(text=f"{index}", sampling_params=greedy(LONG)))
        for _ in range(index % 3):
            next(call)
        call.cancel()

    with ThreadPoolExecutor(10) as pool:
        list(pool.map(ask_and_leave, range(100)))
    wait_until(lambda: scrape(served)["moecluster_engine_kv_used_blocks"] == 0, "blocks are free")
    assert scrape(served)["moecluster_requests_running"] == 0


def test_the_clients_deadline_stops_the_sequence(stub, served):
    with pytest.raises(grpc.RpcError) as raised:
        stub.Generate(pb.GenerateRequest(text="long", sampling_params=greedy(LONG)), timeout=1.0)
    assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    wait_until(lambda: scrape(served)["moecluster_engine_kv_used_blocks"] == 0, "blocks are free after a deadline")


def test_the_requests_time_budget_ends_a_stream(stub, served):
    request = pb.GenerateStreamRequest(text="long", sampling_params=greedy(LONG), timeout_ms=700)
    with pytest.raises(grpc.RpcError) as raised:
        list(stub.GenerateStream(request))
    assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "0.7" in raised.value.details()
    wait_until(lambda: scrape(served)["moecluster_engine_kv_used_blocks"] == 0, "blocks are free after a budget")


TEXT = {"text": "a"}
REFUSALS = {
    "no input": ({}, "input"),
    "an empty text": ({"text": ""}, "text"),
    "no token ids": ({"token_ids": pb.TokenIds()}, "token_ids"),
    "a token id outside the vocabulary": ({"token_ids": pb.TokenIds(ids=[1, 99999])}, "99999"),
    "no messages": ({"chat": pb.ChatMessages()}, "chat"),
    "a role that is none": (
        {"chat": pb.ChatMessages(messages=[pb.ChatMessage(role="wizard", content="x")])}, "wizard"),
    "a template that raises": (
        {"chat": pb.ChatMessages(messages=[
            pb.ChatMessage(role="user", content="x"), pb.ChatMessage(role="system", content="late")])}, "chat"),
    "a negative temperature": ({**TEXT, "sampling_params": pb.SamplingParams(temperature=-1)}, "temperature"),
    "a temperature that is no number": (
        {**TEXT, "sampling_params": pb.SamplingParams(temperature=float("nan"))}, "temperature"),
    "top_k below 0": ({**TEXT, "sampling_params": pb.SamplingParams(top_k=-2)}, "top_k"),
    "top_p of 0": ({**TEXT, "sampling_params": pb.SamplingParams(top_p=0)}, "top_p"),
    "top_p above 1": ({**TEXT, "sampling_params": pb.SamplingParams(top_p=1.5)}, "top_p"),
    "min_p above 1": ({**TEXT, "sampling_params": pb.SamplingParams(min_p=2)}, "min_p"),
    "a repetition penalty of 0": ({**TEXT, "sampling_params": pb.SamplingParams(repetition_penalty=0)}, "repetition"),
    "a presence penalty of 3": ({**TEXT, "sampling_params": pb.SamplingParams(presence_penalty=3)}, "presence_penalty"),
    "a frequency penalty of -3": (
        {**TEXT, "sampling_params": pb.SamplingParams(frequency_penalty=-3)}, "frequency_penalty"),
    "a negative seed": ({**TEXT, "sampling_params": pb.SamplingParams(seed=-1)}, "seed"),
    "max_tokens of 0": ({**TEXT, "sampling_params": pb.SamplingParams(max_tokens=0)}, "max_tokens"),
    "prompt plus max_tokens over the context": (
        {**TEXT, "sampling_params": pb.SamplingParams(max_tokens=4096)}, "4096"),
    "min_tokens above max_tokens": (
        {**TEXT, "sampling_params": pb.SamplingParams(min_tokens=9, max_tokens=8)}, "min_tokens"),
    "21 logprobs": ({**TEXT, "sampling_params": pb.SamplingParams(logprobs=21)}, "logprobs"),
    "an empty stop string": ({**TEXT, "sampling_params": pb.SamplingParams(stop=[""])}, "stop"),
    "17 stop strings": ({**TEXT, "sampling_params": pb.SamplingParams(stop=["x"] * 17)}, "stop"),
    "a stop token outside the vocabulary": (
        {**TEXT, "sampling_params": pb.SamplingParams(stop_token_ids=[99999])}, "stop_token_ids"),
    "a time budget of 0": ({**TEXT, "timeout_ms": 0}, "timeout_ms"),
    "a request over the size limit": ({"text": "x" * (1 << 20)}, "1048576"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.parametrize("streamed", [False, True], ids=["unary", "stream"])
def test_bad_input_is_refused_with_its_field_and_limit(stub, case, streamed):
    fields, named = REFUSALS[case]
    with pytest.raises(grpc.RpcError) as raised:
        if streamed:
            list(stub.GenerateStream(pb.GenerateStreamRequest(**fields)))
        else:
            stub.Generate(pb.GenerateRequest(**fields))
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    details = raised.value.details()
    assert named in details
    assert "Traceback" not in details
    assert "/" not in details.replace("and/or", "")


def test_invalid_utf8_is_refused(channel):
    call = channel.unary_unary(f"/{SERVICE}/Generate")  # no serializer: the bytes go out as they are
    with pytest.raises(grpc.RpcError) as raised:
        call(b"\x0a\x02\xff\xfe")  # field 1 (text), two bytes that are not UTF-8
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "Traceback" not in raised.value.details()


def test_a_full_queue_is_refused_with_resource_exhausted(stub, served):
    """Two replicas take 16 running and 16 waiting sequences each; of 120 at once some must be refused."""
    requests = (pb.GenerateStreamRequest(text=f"{index}", sampling_params=greedy(LONG)) for index in range(120))
    calls = [stub.GenerateStream(request) for request in requests]

    def refusal(call):
        try:
            next(call)
        except grpc.RpcError as error:
            return error.code(), error.details(), dict(error.trailing_metadata() or ())
        return None

    with ThreadPoolExecutor(len(calls)) as pool:
        answers = [pool.submit(refusal, call) for call in calls]
        wait_until(lambda: any(answer.done() and answer.result() for answer in answers), "a refusal")
        for call in calls:
            call.cancel()
    ends = [answer.result() for answer in answers if answer.result()]
    assert {code for code, _, _ in ends} <= {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED}
    refused = [end for end in ends if end[0] == grpc.StatusCode.RESOURCE_EXHAUSTED]
    assert refused
    assert all("try again in" in details for _, details, _ in refused)
    assert all(100 <= int(trailing["grpc-retry-pushback-ms"]) <= 60_000 for _, _, trailing in refused)
    wait_until(lambda: scrape(served)["moecluster_engine_kv_used_blocks"] == 0, "blocks are free")


@pytest.mark.parametrize("how", ["cancelled", "stopped", "out of time"])
def test_an_id_can_be_used_again_at_once_however_its_request_ended(stub, how):
    for _ in range(4):
        if how == "cancelled":
            call = stub.GenerateStream(
                pb.GenerateStreamRequest(text="x", sampling_params=greedy(LONG), request_id="again")
            )
            next(call)
            call.cancel()
        elif how == "stopped":
            text = stub.Generate(pb.GenerateRequest(text="x", sampling_params=greedy(9))).text
            stopped = greedy(LONG, stop=[text[3:5]])
            assert stub.Generate(pb.GenerateRequest(text="x", sampling_params=stopped, request_id="again")).text
        else:
            late = pb.GenerateRequest(text="x", sampling_params=greedy(LONG), request_id="again", timeout_ms=50)
            with pytest.raises(grpc.RpcError):
                stub.Generate(late)
        answer = stub.Generate(pb.GenerateRequest(text="x", sampling_params=greedy(6), request_id="again"))
        assert (answer.request_id, len(answer.token_ids)) == ("again", 6)


def test_a_cancel_leaves_anothers_equal_id_alone(stub):
    request = pb.GenerateStreamRequest(text="x", sampling_params=greedy(150), request_id="equal")
    staying = stub.GenerateStream(request)
    next(staying)
    for _ in range(4):
        leaving = stub.GenerateStream(request)
        next(leaving)
        leaving.cancel()
    assert list(staying)[-1].usage.completion_tokens == 150


def test_health_says_serving_for_the_server_and_the_service(channel):
    stub = health_pb2_grpc.HealthStub(channel)
    for service in ("", SERVICE):
        reply = stub.Check(health_pb2.HealthCheckRequest(service=service))
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as raised:
        stub.Check(health_pb2.HealthCheckRequest(service="no.Such"))
    assert raised.value.code() == grpc.StatusCode.NOT_FOUND


def test_a_health_watch_begins_with_the_state_of_the_moment(channel):
    call = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
    assert next(call).status == health_pb2.HealthCheckResponse.SERVING
    call.cancel()


def test_reflection_lists_the_service_and_its_descriptor(channel):
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
    ]
    listed, described = stub.ServerReflectionInfo(iter(requests))
    assert SERVICE in [service.name for service in listed.list_services_response.service]
    assert b"GenerateStream" in described.file_descriptor_response.file_descriptor_proto[0]


def test_buf_curl_streams_an_answer(served):
    """A client that shares no code with ours: buf, from its npm package."""
    buf = os.environ.get("BUF") or shutil.which("buf")
    if buf is None:
        pytest.skip("buf is not installed")
    request = {"text": "hello", "samplingParams": {"temperature": 0, "maxTokens": 5, "ignoreEos": True}}
    done = subprocess.run(
        [
            buf, "curl", "--protocol", "grpc", "--http2-prior-knowledge", "--data", json.dumps(request),
            f"http://127.0.0.1:{served.grpc_port}/{SERVICE}/GenerateStream",
        ],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    decoder, pieces, rest = json.JSONDecoder(), [], done.stdout.strip()
    while rest:
        piece, end = decoder.raw_decode(rest)
        pieces.append(piece)
        rest = rest[end:].strip()
    assert sum(len(piece.get("tokenIds", [])) for piece in pieces) == 5
    assert pieces[-1]["finishReason"] == "FINISH_REASON_LENGTH"
