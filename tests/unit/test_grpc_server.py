"""The handlers behind a plain grpc.aio server on loopback, driven as Ray Serve's default proxy drives them.

`ServeLike` does what ray/serve/_private/proxy.py does with a handler: it gives it bytes and a context of its own, takes
over code and details with a unary message or with an exception, and otherwise ends the call with OK.
"""

import asyncio
import logging
import pickle
import threading
from contextlib import asynccontextmanager, suppress
from unittest.mock import Mock

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc
from haproxy_tools import haproxy
from serving_fakes import (
    HELLO,
    IM_END,
    VOCAB_SIZE,
    EchoBackend,
    TickingClock,
    byte_ids,
    make_service,
    write_tokenizer,
)
from tls_files import Authority

from cluster.client.grpc_client import Client, TlsFiles
from cluster.errors import CheckpointError, ClusterError, Overloaded, ShardUnavailable
from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.pb.moecluster.v1 import inference_pb2_grpc
from cluster.runtime.front.tls import GrpcFront
from cluster.serving.admission.admission import Admission
from cluster.serving.admission.api_keys import ApiKeys, new_key
from cluster.serving.admission.callers import client_of, is_local
from cluster.serving.grpc.context import MAX_DETAILS_BYTES, MAX_DETAILS_CHARS, StreamFailed, peer_of, set_status
from cluster.serving.grpc.handlers import GrpcInferenceService
from cluster.serving.grpc.health import GrpcHealthService
from cluster.serving.grpc.messages import to_prompt
from cluster.serving.grpc.registration import SERVICE_NAME, add_inference_service
from cluster.serving.health import HealthState
from cluster.serving.service import ServiceLimits
from cluster.serving.text.tokenizer import Tokenizer
from cluster.types import ModelInfo, SequenceUpdate

MAX_REQUEST_BYTES = 2000
UNARY = (
    "Generate", "Score", "Embed", "Classify", "ClassifyTokens", "AnswerSpan", "Tokenize", "Detokenize", "GetModelInfo",
)  # fmt: skip


class FakeContext:
    """The part of RayServegRPCContext that handlers use."""

    def __init__(self, metadata=()):
        self.code = self.details = None
        self.metadata, self.trailing = metadata, {}

    def set_code(self, code):
        self.code = code

    def set_trailing_metadata(self, metadata):
        self.trailing = dict(metadata)

    def invocation_metadata(self):
        return self.metadata

    def peer(self):
        return "ipv4:192.0.2.7:51234"

    def set_details(self, details):
        self.details = details


class ServeLike:
    """A servicer whose methods forward to `ingress` as Serve's proxy does."""

    def __init__(self, ingress):
        self.ingress = ingress

    def __getattr__(self, name):
        method = getattr(self.ingress, name)

        async def unary(request, wire):
            context = FakeContext(wire.invocation_metadata())
            response = await method(request, grpc_context=context)
            if context.code:
                wire.set_code(context.code)
                wire.set_details(context.details)
            return response

        async def stream(request, wire):
            context = FakeContext(wire.invocation_metadata())
            try:
                async for response in method(request, grpc_context=context):
                    yield response
            except StreamFailed as failed:
                await wire.abort(context.code, context.details or failed.args[0])

        return stream if name in ("GenerateStream", "Watch") else unary


class Ingress(GrpcInferenceService, GrpcHealthService):
    def __init__(self, service, state):
        GrpcInferenceService.__init__(self, service)
        GrpcHealthService.__init__(self, state, service.admission)


class Served:
    def __init__(self, port, channel, service, backend, health):
        self.port = port
        self.service, self.backend, self.health = service, backend, health
        self.stub = inference_pb2_grpc.InferenceServiceStub(channel)
        self.health_stub = health_pb2_grpc.HealthStub(channel)
        self.channel = channel


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def serve(tokenizer):
    """Returns a function that runs an async scenario against a server: scenario(served)."""

    @asynccontextmanager
    async def running(backend, keys):
        service = make_service(tokenizer, backend, max_request_bytes=MAX_REQUEST_BYTES, keys=keys)
        health, server = HealthState(), grpc.aio.server()
        servicer = ServeLike(Ingress(service, health))
        add_inference_service(servicer, server)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        reflection.enable_server_reflection((SERVICE_NAME, reflection.SERVICE_NAME), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                yield Served(port, channel, service, backend, health)
        finally:
            await server.stop(None)

    def run(scenario, backend=None, keys=None):
        async def main():
            async with running(backend or EchoBackend(), keys) as served:
                return await asyncio.wait_for(scenario(served), 20)

        return asyncio.run(main())

    return run


async def refusal(call):
    """Returns (code, details) of a call that fails."""
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call
    return failure.value.code(), failure.value.details()


async def collect(stream):
    return [message async for message in stream]


def failing(*script):
    return EchoBackend(script=script)


def test_generate_answers_with_text_tokens_usage_and_reason(serve):
    async def scenario(served):
        params = pb.SamplingParams(temperature=0, logprobs=1)
        request = pb.GenerateRequest(text="hello", sampling_params=params, request_id="mine")
        return await served.stub.Generate(request)

    response = serve(scenario)
    assert (response.text, list(response.token_ids)) == ("hello", [HELLO, IM_END])
    assert (response.request_id, response.finish_reason) == ("mine", pb.FINISH_REASON_STOP)
    assert response.usage == pb.Usage(prompt_tokens=1, completion_tokens=2)
    top = pb.TopLogprob(token_id=HELLO, logprob=-HELLO)
    assert response.logprobs[0] == pb.TokenLogprobs(token_id=HELLO, logprob=-HELLO, top=[top])


def test_a_stream_names_its_request_first_and_its_end_last(serve):
    async def scenario(served):
        ids = pb.TokenIds(ids=byte_ids("ab"))
        params = pb.SamplingParams(max_tokens=2)
        return await collect(
            served.stub.GenerateStream(pb.GenerateStreamRequest(token_ids=ids, sampling_params=params))
        )

    first, last = serve(scenario)
    assert (first.request_id, first.text, last.request_id, last.text) == ("generated-1", "a", "", "b")
    assert first.finish_reason == pb.FINISH_REASON_UNSPECIFIED
    assert not first.HasField("usage")
    assert last.finish_reason == pb.FINISH_REASON_LENGTH
    assert last.usage == pb.Usage(prompt_tokens=2, completion_tokens=2)


def test_every_sampling_field_reaches_the_engine(serve):
    sent = {
        "temperature": 0.7, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1,
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "seed": 2**62, "max_tokens": 7, "min_tokens": 2,
        "stop": ("x", "yz"), "stop_token_ids": (5, 6), "ignore_eos": True, "logprobs": 0,
    }  # fmt: skip

    async def scenario(served):
        chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="a")])
        params = pb.SamplingParams(**sent)
        await served.stub.Generate(pb.GenerateRequest(chat=chat, sampling_params=params, timeout_ms=60_000))
        return served.backend.requests[0]

    request = serve(scenario)
    assert {name: getattr(request.params, name) for name in sent} == sent
    assert request.timeout_s == 60.0


def test_zero_is_not_unset(serve):
    """The service's default temperature is 0.7."""

    async def scenario(served):
        for params in (pb.SamplingParams(), pb.SamplingParams(temperature=0)):
            await served.stub.Generate(pb.GenerateRequest(text="a", sampling_params=params))
        return [request.params.temperature for request in served.backend.requests]

    assert serve(scenario) == [0.7, 0.0]


def test_tokenize_detokenize_and_model_info(serve):
    async def scenario(served):
        tokens = await served.stub.Tokenize(pb.TokenizeRequest(text="hello"))
        skipped = await served.stub.Detokenize(pb.DetokenizeRequest(token_ids=[HELLO, IM_END]))
        whole = await served.stub.Detokenize(pb.DetokenizeRequest(token_ids=[HELLO, IM_END], skip_special_tokens=False))
        return tokens, skipped.text, whole.text, await served.stub.GetModelInfo(pb.GetModelInfoRequest())

    tokens, skipped, whole, info = serve(scenario)
    assert (list(tokens.token_ids), tokens.max_model_len) == ([HELLO], 64)
    assert (skipped, whole) == ("hello", "hello<|im_end|>")
    assert (info.model_id, info.vocab_size, list(info.eos_token_ids)) == ("tiny", VOCAB_SIZE, [IM_END])


BAD_REQUESTS = [
    (pb.GenerateRequest(), "input is empty"),
    (pb.GenerateRequest(text=""), "text is empty"),
    (pb.GenerateRequest(token_ids=pb.TokenIds()), "token_ids is empty"),
    (pb.GenerateRequest(chat=pb.ChatMessages()), "chat has 0 messages"),
    (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[2**32 - 1])), "4294967295 at position 0"),
    (pb.GenerateRequest(text="a", timeout_ms=0), "timeout_ms is 0"),
    (pb.GenerateRequest(text="a", request_id="a b"), "request_id is 'a b'"),
    (pb.GenerateRequest(text="a", sampling_params=pb.SamplingParams(top_p=2)), "top_p is 2.0"),
    (pb.GenerateRequest(text="a", sampling_params=pb.SamplingParams(max_tokens=64)), "max_tokens is 64"),
    (pb.GenerateRequest(text="a", sampling_params=pb.SamplingParams(max_tokens=-1)), "max_tokens is -1"),
    (pb.GenerateRequest(text="x" * MAX_REQUEST_BYTES), f"2003 bytes, at most {MAX_REQUEST_BYTES}"),
    (pb.GenerateRequest(chat=pb.ChatMessages(messages=[pb.ChatMessage(role="root")])), "role 'root'"),
]


def test_bad_requests_are_invalid_arguments_with_a_reason(serve):
    async def scenario(served):
        for request, reason in BAD_REQUESTS:
            streamed = pb.GenerateStreamRequest.FromString(request.SerializeToString())
            for call in (served.stub.Generate(request), collect(served.stub.GenerateStream(streamed))):
                code, details = await refusal(call)
                assert code is grpc.StatusCode.INVALID_ARGUMENT
                assert reason in details
        assert not served.backend.requests
        code, details = await refusal(served.stub.Detokenize(pb.DetokenizeRequest(token_ids=[300])))
        assert (code, "300 at position 0" in details) == (grpc.StatusCode.INVALID_ARGUMENT, True)

    serve(scenario)


def test_large_requests_are_read_beside_the_event_loop(serve, monkeypatch):
    """All of at least LARGE_BYTES, here 40: parsed in the thread, and made a prompt there."""
    threads = []

    def noted(read):
        def in_thread(*args):
            threads.append(threading.current_thread() is not threading.main_thread())
            return read(*args)

        return in_thread

    monkeypatch.setattr("cluster.serving.grpc.calls.LARGE_BYTES", 40)
    monkeypatch.setattr(GrpcInferenceService, "_parse", noted(GrpcInferenceService._parse))
    monkeypatch.setattr("cluster.serving.grpc.messages.to_prompt", noted(to_prompt))

    async def scenario(served):
        for size, beside in ((10, False), (50, True)):
            threads.clear()
            ids = pb.TokenIds(ids=[1] * size)
            await served.stub.Generate(pb.GenerateRequest(token_ids=ids))
            await collect(served.stub.GenerateStream(pb.GenerateStreamRequest(token_ids=ids)))
            await served.stub.Tokenize(pb.TokenizeRequest(text="x" * size))
            await refusal(served.stub.Score(pb.ScoreRequest(token_ids=ids)))  # no scores from this backend
            assert threads == [beside] * 8

    serve(scenario)


def test_bytes_that_are_no_message_are_invalid_arguments(serve):
    """0x0a 0x02: field 1 (text), two bytes, which are not UTF-8. 0x0a 0x50: 80 bytes that do not come."""

    async def scenario(served):
        for raw, reason in ((b"\x0a\x02\xff\xfe", "UTF-8"), (b"\x0a\x50a", "request cannot be read")):
            unary = served.channel.unary_unary(f"/{SERVICE_NAME}/Generate")
            stream = served.channel.unary_stream(f"/{SERVICE_NAME}/GenerateStream")
            for call in (unary(raw), collect(stream(raw))):
                code, details = await refusal(call)
                assert code is grpc.StatusCode.INVALID_ARGUMENT
                assert reason in details

    serve(scenario)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Overloaded("the queue is full: 256 requests wait"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (ShardUnavailable("shard 3 is gone", 3), grpc.StatusCode.UNAVAILABLE),
    ],
)
def test_public_errors_reach_the_client_as_they_are_also_half_way(serve, error, code):
    async def scenario(served):
        assert await refusal(served.stub.Generate(pb.GenerateRequest(text="a"))) == (code, str(error))
        stream = served.stub.GenerateStream(pb.GenerateStreamRequest(text="a"))
        assert (await stream.read()).text == "a"
        assert await refusal(stream.read()) == (code, str(error))

    first = SequenceUpdate(request_id="r", token_ids=byte_ids("a"))
    serve(scenario, failing(first, SequenceUpdate(request_id="r", finish_reason="error", error=error)))


@pytest.mark.parametrize("error", [KeyError("/root/secret/path"), CheckpointError("/root/secret/path is missing")])
def test_other_errors_are_logged_and_the_client_gets_the_id_only(serve, caplog, error):
    async def scenario(served):
        unary = await refusal(served.stub.Generate(pb.GenerateRequest(text="a", request_id="mine")))
        streamed = pb.GenerateStreamRequest(text="a", request_id="mine")
        return unary, await refusal(collect(served.stub.GenerateStream(streamed)))

    with caplog.at_level(logging.ERROR, logger="cluster"):
        expected = (grpc.StatusCode.INTERNAL, "internal error, request id mine; see the server's log")
        assert serve(scenario, failing(error)) == (expected, expected)
    assert [r.exc_info[1] for r in caplog.records] == [error, error]


def test_a_clients_cancel_and_deadline_close_the_sequence(serve):
    async def scenario(served):
        call = served.stub.GenerateStream(pb.GenerateStreamRequest(text="a", request_id="first"))
        await served.backend.reached.wait()
        call.cancel()
        while served.service.admission.num_running:
            await asyncio.sleep(0.001)
        code, _ = await refusal(served.stub.Generate(pb.GenerateRequest(text="a", request_id="second"), timeout=0.1))
        while served.service.admission.num_running:
            await asyncio.sleep(0.001)
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert served.backend.closed == ["first", "second"]
        late = pb.GenerateRequest(text="a", request_id="third", timeout_ms=10)
        code, details = await refusal(served.stub.Generate(late))
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "request third did not finish within its time budget of 0.01 s" in details

    serve(scenario, EchoBackend(hang=True))


def test_a_draining_server_is_unavailable(serve):
    async def scenario(served):
        served.service.admission.drain()
        return await refusal(served.stub.Generate(pb.GenerateRequest(text="a")))

    assert serve(scenario)[0] is grpc.StatusCode.UNAVAILABLE


def test_thirty_two_at_once_get_their_own_answers(serve):
    async def scenario(served):
        texts = [f"request {i}" for i in range(32)]
        calls = [served.stub.Generate(pb.GenerateRequest(text=text)) for text in texts]
        return texts, [(await call).text for call in calls]

    texts, answers = serve(scenario)
    assert answers == texts


def test_reflection_finds_the_service(serve):
    async def scenario(served):
        stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
        ask = reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE_NAME)
        return await collect(stub.ServerReflectionInfo(iter([ask])))

    (found,) = serve(scenario)
    assert found.file_descriptor_response.file_descriptor_proto


def test_health_check_and_watch_follow_the_state(serve):
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING

    async def scenario(served):
        stub = served.health_stub
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE_NAME))
        seen = [(await watch.read()).status]
        for state in (True, False):
            await asyncio.to_thread(served.health.set, state)
            seen.append((await watch.read()).status)
            for name in ("", SERVICE_NAME):
                check = await stub.Check(health_pb2.HealthCheckRequest(service=name))
                assert check.status == seen[-1]
        listed = await stub.List(health_pb2.HealthListRequest())
        assert set(listed.statuses) == {"", SERVICE_NAME}
        return seen

    assert serve(scenario) == [not_serving, serving, not_serving]


def test_an_unknown_service_is_not_found_but_can_be_watched(serve):
    async def scenario(served):
        ask = health_pb2.HealthCheckRequest(service="other")
        code, _ = await refusal(served.health_stub.Check(ask))
        assert code is grpc.StatusCode.NOT_FOUND
        watch = served.health_stub.Watch(ask)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        assert not watch.done()

    serve(scenario)


def test_a_closed_watch_leaves_nothing_behind():
    async def scenario():
        state = HealthState()
        watch = state.watch()
        assert await anext(watch) is False
        assert len(state._watchers) == 1
        await watch.aclose()
        assert not state._watchers

    asyncio.run(scenario())


@pytest.mark.parametrize("char", ["a", "é", "🙂"])
def test_long_details_are_cut_so_that_trailers_carry_them(char):
    context = FakeContext()
    details = set_status(context, Overloaded(char * 5000), "r")
    assert details == context.details
    assert details.endswith("…")
    assert len(details) <= MAX_DETAILS_CHARS
    assert MAX_DETAILS_BYTES - 8 <= len(details.encode()) * (2 if char == "a" else 1) <= MAX_DETAILS_BYTES + 8


def test_the_exception_of_a_failed_stream_travels_between_actors():
    copy = pickle.loads(pickle.dumps(StreamFailed("details")))
    assert str(copy) == "details"


def test_behind_haproxy_a_failed_stream_ends_with_its_status_and_no_exception():
    context = FakeContext()
    ingress = GrpcInferenceService(FakeService(), raise_failures=False)

    async def pieces():
        return [piece async for piece in ingress.GenerateStream(b"\xff", context)]

    assert asyncio.run(pieces()) == []
    assert context.code == grpc.StatusCode.INVALID_ARGUMENT
    assert "cannot be read" in context.details


# API keys


class Bomb:
    """To unpickle it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


class FakeService:
    """The part of a service that refusals need."""

    limits = ServiceLimits()
    spans = None

    def __init__(self, admission=None):
        self.admission = admission or Admission()
        self.adapters = tuple

    def new_request_id(self):
        return "r"

    def count_refused(self, error):
        pass


class Keyed:
    """Keys of one client, "alice", and the metadata that she sends."""

    def __init__(self, folder, *limits):
        key, line = new_key("alice")
        (folder / "keys").write_text(" ".join((line, *limits)))
        self.keys = ApiKeys(folder / "keys", TickingClock())
        self.metadata = (("authorization", f"Bearer {key}"),)


def every_call(stub, metadata=()):
    """Each rpc of the service, once."""
    return [
        stub.Generate(pb.GenerateRequest(text="a"), metadata=metadata),
        collect(stub.GenerateStream(pb.GenerateStreamRequest(text="a"), metadata=metadata)),
        stub.Tokenize(pb.TokenizeRequest(text="a"), metadata=metadata),
        stub.Detokenize(pb.DetokenizeRequest(token_ids=[1]), metadata=metadata),
        stub.GetModelInfo(pb.GetModelInfoRequest(), metadata=metadata),
    ]


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ((), "an API key is needed"),
        ((("authorization", "Bearer moe-guess"),), "not known here"),
        ((("x-client-id", "alice"),), "an API key is needed"),
    ],
)
def test_without_a_known_key_no_call_is_answered_and_each_is_counted(serve, tmp_path, metadata, words):
    async def scenario(served):
        calls = every_call(served.stub, metadata)
        for call in calls:
            code, details = await refusal(call)
            assert (code, words in details) == (grpc.StatusCode.UNAUTHENTICATED, True)
        assert served.service._tracker._metrics.named("finished") == [("unauthenticated",)] * len(calls)
        assert served.service._tracker._metrics.named("started") == [()] * len(calls)
        assert not served.backend.requests

    serve(scenario, keys=Keyed(tmp_path).keys)


def test_keys_and_tls_are_asked_for_together_behind_haproxy(serve, tmp_path):
    """A client with the key that trusts the certificate is answered; one that lacks either is not."""
    authority, (key, line) = Authority(tmp_path, "ours"), new_key("alice")
    (tmp_path / "keys").write_text(line)
    pair = authority.issue("server", server=True)

    def ask(port, **how):
        with Client(f"127.0.0.1:{port}", **how) as client:
            try:
                return client.model_info().model_id
            except ClusterError as error:
                return str(error)

    async def scenario(served):
        with haproxy(tmp_path, served.port, GrpcFront(tls_cert=pair.cert, tls_key=pair.key)) as port:
            tls = TlsFiles(ca=authority.cert)
            assert await asyncio.to_thread(ask, port, api_key=key, tls=tls) == served.service.info.model_id
            assert "not known here" in await asyncio.to_thread(ask, port, api_key="moe-guess", tls=tls)
            refused = await asyncio.to_thread(ask, port, tls=tls)
            assert "an API key is needed" in refused
            assert "set $MOE_CLUSTER_API_KEY, or give --api-key-file" in refused
            assert "does the server speak TLS" in await asyncio.to_thread(ask, port, api_key=key)

    serve(scenario, keys=ApiKeys(tmp_path / "keys", TickingClock()))


def test_nothing_of_a_strangers_request_is_parsed(serve, tmp_path):
    async def scenario(served):
        return await refusal(served.channel.unary_unary(f"/{SERVICE_NAME}/Generate")(b"\xff" * (2 * MAX_REQUEST_BYTES)))

    assert serve(scenario, keys=Keyed(tmp_path).keys)[0] is grpc.StatusCode.UNAUTHENTICATED


def test_with_a_key_every_call_is_answered_and_counts_for_its_name(serve, tmp_path):
    alice = Keyed(tmp_path)

    async def scenario(served):
        for call in every_call(
            served.stub, (*alice.metadata, ("x-client-id", "bob"), ("x-forwarded-for", "192.0.2.1"))
        ):
            await call
        return [request.client for request in served.backend.requests]

    assert serve(scenario, keys=alice.keys) == ["alice", "alice"]


def test_health_and_reflection_are_for_everybody(serve, tmp_path):
    async def scenario(served):
        served.health.set(True)
        check = await served.health_stub.Check(health_pb2.HealthCheckRequest())
        watch = served.health_stub.Watch(health_pb2.HealthCheckRequest())
        stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        [found] = await collect(stub.ServerReflectionInfo(iter([ask])))
        return check.status, (await watch.read()).status, len(found.list_services_response.service)

    serving = health_pb2.HealthCheckResponse.SERVING
    assert serve(scenario, keys=Keyed(tmp_path).keys) == (serving, serving, 2)


@pytest.mark.parametrize(
    ("peer", "local"),
    [
        ("ipv4:127.0.0.1:51234", True),
        ("ipv6:[::1]:51234", True),
        ("ipv6:%5B::1%5D:51234", True),
        ("ipv6:[::ffff:127.0.0.1]:51234", True),
        ("ipv4:192.0.2.7:51234", False),
        ("ipv6:[::ffff:192.0.2.7]:51234", False),
        ("ipv6:[2001:db8::1]:51234", False),
        ("", False),
        (None, False),
    ],
)
def test_behind_a_proxy_of_this_machine_nobody_else_is_answered(peer, local):
    refused = []
    service = FakeService(Admission(local_only=True))
    service.count_refused = refused.append
    service.info = ModelInfo(
        model_id="tiny", vocab_size=1, max_model_len=1, num_hidden_layers=1, num_experts=1, num_experts_per_tok=1,
        dtype="float32", eos_token_ids=(),
    )  # fmt: skip
    context = FakeContext()
    context.peer = lambda: peer
    assert is_local(peer_of(context)) == local
    info = asyncio.run(GrpcInferenceService(service).GetModelInfo(b"", context))
    assert info.model_id == ("tiny" if local else "")
    assert context.code == (None if local else grpc.StatusCode.PERMISSION_DENIED)
    assert len(refused) == (not local)


def test_a_key_over_its_limit_hears_when_to_come_again(serve, tmp_path):
    """One request a minute: the next in 60 s. The answer to "a" is one token and EOS, with the prompt 3 tokens."""
    alice = Keyed(tmp_path, "requests_per_minute=1")

    async def scenario(served):
        await served.stub.Generate(pb.GenerateRequest(text="a"), metadata=alice.metadata)
        return [await refusal(call) for call in every_call(served.stub, alice.metadata)]

    refusals = serve(scenario, keys=alice.keys)
    assert {code for code, _ in refusals} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert all("requests_per_minute=1: try again in 60.0 s" in details for _, details in refusals)


def test_the_hint_of_a_limit_is_the_one_that_grpc_clients_follow(tmp_path):
    alice = Keyed(tmp_path, "requests_per_minute=1")
    ingress = GrpcInferenceService(FakeService(Admission(alice.keys)))
    with alice.keys.admitted("alice"):
        pass
    context = FakeContext(alice.metadata)
    asyncio.run(ingress.GetModelInfo(b"", context))
    assert context.trailing == {"grpc-retry-pushback-ms": "60000"}


def test_a_stream_holds_its_keys_place_until_its_client_leaves(serve, tmp_path):
    alice = Keyed(tmp_path, "concurrent=1")

    async def scenario(served):
        request = pb.GenerateStreamRequest(text="a")
        first = served.stub.GenerateStream(request, metadata=alice.metadata)
        await served.backend.reached.wait()
        refused = await refusal(collect(served.stub.GenerateStream(request, metadata=alice.metadata)))
        first.cancel()
        while served.service.admission.num_running:
            await asyncio.sleep(0.001)
        await served.stub.GetModelInfo(pb.GetModelInfoRequest(), metadata=alice.metadata)
        return refused

    code, details = serve(scenario, EchoBackend(hang=True), keys=alice.keys)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "concurrent=1" in details


def test_a_key_pays_for_the_tokens_of_its_stream(serve, tmp_path):
    """4 tokens a minute; "ab" is 2, answered by 2 and EOS: 5. The next request waits for 2 tokens, 30 s."""
    alice = Keyed(tmp_path, "tokens_per_minute=4")

    async def scenario(served):
        request = pb.GenerateStreamRequest(text="ab")
        await collect(served.stub.GenerateStream(request, metadata=alice.metadata))
        return await refusal(collect(served.stub.GenerateStream(request, metadata=alice.metadata)))

    assert "tokens_per_minute=4: try again in 30.0 s" in serve(scenario, keys=alice.keys)[1]


def test_no_key_is_ever_logged(serve, tmp_path, caplog):
    alice = Keyed(tmp_path)

    async def scenario(served):
        for metadata in (alice.metadata, (("authorization", "Bearer moe-guess"),)):
            for call in every_call(served.stub, metadata):
                with suppress(grpc.aio.AioRpcError):
                    await call

    with caplog.at_level(logging.DEBUG):
        serve(scenario, keys=alice.keys)
    assert "moe-" not in caplog.text
    assert "a call was refused" in caplog.text


def test_a_pickle_for_a_request_is_not_loaded(serve, tmp_path):
    bomb = pickle.dumps(Bomb(str(tmp_path / "it works")))
    pickle.loads(bomb)
    assert (tmp_path / "it works").exists()
    bomb = pickle.dumps(Bomb(str(tmp_path / "boom")))

    async def scenario(served):
        calls = [served.channel.unary_unary(f"/{SERVICE_NAME}/{name}")(bomb) for name in UNARY]
        calls += [served.channel.unary_unary(f"/grpc.health.v1.Health/{name}")(bomb) for name in ("Check", "List")]
        calls.append(collect(served.channel.unary_stream(f"/{SERVICE_NAME}/GenerateStream")(bomb)))
        for call in calls:
            with suppress(grpc.aio.AioRpcError):
                await call

    serve(scenario)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize(
    ("metadata", "client"),
    [
        ((), "192.0.2.7"),
        ((("x-forwarded-for", "198.51.100.4"),), "198.51.100.4"),
        ((("x-forwarded-for", "198.51.100.4"), ("x-client-id", "team")), "team"),
    ],
)
def test_a_request_counts_for_its_client_id_else_for_the_host_that_it_comes_from(metadata, client):
    assert client_of(dict(metadata), "192.0.2.7") == client


def test_registration_routes_every_method_as_bytes():
    """Serve replaces the handlers it finds in `_method_handlers` of a generic handler, keyed by the full method."""
    servers = []

    class Server:
        def add_generic_rpc_handlers(self, handlers):
            servers.append(handlers)

        def add_registered_method_handlers(self, service, handlers):
            servers.append((service, handlers))

    names = {"GenerateStream", *UNARY}
    add_inference_service(Mock(), Server())
    (generic,), (service, registered) = servers[:2]
    assert set(generic._method_handlers) == {f"/{SERVICE_NAME}/{name}" for name in names}
    assert (service, set(registered)) == ("moecluster.v1.InferenceService", names)
    assert all(handler.request_deserializer is None for handler in registered.values())
    assert [name for name, h in registered.items() if h.response_streaming] == ["GenerateStream"]
