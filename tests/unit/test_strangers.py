"""Calls without a key: bounded in number and rate, by host and in all, and in no place of those with one."""

import asyncio
import time
from contextlib import ExitStack, asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from ray.serve._private.grpc_util import enable_server_reflection, gRPCGenericServer
from serving_fakes import EchoBackend, TickingClock, make_service, write_tokenizer

from cluster.errors import Forbidden, Overloaded, Unauthenticated
from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.pb.moecluster.v1 import inference_pb2_grpc
from cluster.runtime.front import serve_proxy as proxy
from cluster.runtime.front.serve_proxy import add_inference_service
from cluster.serving.admission.admission import Admission, AdmissionLimits
from cluster.serving.admission.api_keys import ApiKeys, new_key
from cluster.serving.admission.keyless import MAX_HOSTS, KeylessCalls, KeylessLimits
from cluster.serving.admission.questions import QuestionLimits, Questions
from cluster.serving.grpc import gate as grpc_gate
from cluster.serving.grpc.handlers import GrpcInferenceService
from cluster.serving.grpc.health import GrpcHealthService
from cluster.serving.grpc.registration import SERVICE_NAME
from cluster.serving.health import HealthState
from cluster.serving.text.tokenizer import Tokenizer

KEYLESS = KeylessLimits(max_calls=4, max_calls_per_host=3, calls_per_minute=60)
LIMITS = AdmissionLimits(keyless=KEYLESS)
HERE, ELSEWHERE = "127.0.0.1", "192.0.2.7"


def keyless(clock=None):
    return KeylessCalls(KEYLESS, clock or TickingClock())


@pytest.fixture
def key(tmp_path):
    """The file's keys, and the metadata of one of them."""
    secret, line = new_key("alice")
    (tmp_path / "keys").write_text(line)
    return ApiKeys(tmp_path / "keys", TickingClock()), {"authorization": f"Bearer {secret}"}


def test_a_host_has_so_many_calls_that_stay_and_others_have_room():
    known = keyless()
    with ExitStack() as calls:
        for _ in range(3):
            calls.enter_context(known.open("a"))
        with pytest.raises(Overloaded, match="at most 3 calls without a key at a time from one host: try again"):
            calls.enter_context(known.open("a"))
        calls.enter_context(known.open("b"))
        with pytest.raises(Overloaded, match="at most 4 calls without a key at a time: try again"):
            calls.enter_context(known.open("c"))
    with known.open("a"):
        pass


def test_a_hosts_calls_come_at_a_rate():
    """One a second in the long run, a minute's worth at once."""
    clock = TickingClock()
    known = keyless(clock)
    for _ in range(60):
        known.count("a")
    with pytest.raises(Overloaded, match=r"60 calls without a key a minute: try again in 1\.0 s"):
        known.count("a")
    known.count("b")
    clock.now_s += 1.0
    known.count("a")


def test_a_bounded_number_of_hosts_is_remembered():
    known = keyless()
    for number in range(MAX_HOSTS + 50):
        with known.open(f"host-{number}"):
            pass
    assert len(known._rates) == MAX_HOSTS
    assert not known._open


def test_wrong_keys_are_counted_and_right_ones_are_not(key):
    keys, metadata = key
    admission = Admission(keys, LIMITS, clock=TickingClock())
    for _ in range(60):
        with pytest.raises(Unauthenticated):
            admission.identify({"authorization": "Bearer guess"}, ELSEWHERE)
    with pytest.raises(Overloaded, match="60 calls without a key a minute"):
        admission.identify({}, ELSEWHERE)
    for _ in range(100):
        assert admission.identify(metadata, ELSEWHERE) == "alice"
    with pytest.raises(Unauthenticated):
        admission.identify({}, "192.0.2.8")


def test_too_many_requests_are_refused_and_watches_take_none_of_their_places(key):
    keys, metadata = key
    admission = Admission(keys, AdmissionLimits(max_calls=2, keyless=KEYLESS))
    with ExitStack() as calls:
        for _ in range(3):
            calls.enter_context(admission.watch({}, ELSEWHERE))
        for _ in range(2):
            assert calls.enter_context(admission.call(metadata, ELSEWHERE)) == "alice"
        with pytest.raises(Overloaded, match=r"has 2 requests, as many as it takes: try again in 1\.0 s"):
            calls.enter_context(admission.call(metadata, ELSEWHERE))
        admission.question({}, ELSEWHERE)
        calls.enter_context(admission.watch({}, HERE))
    with admission.call(metadata, ELSEWHERE):
        pass


def test_the_host_is_the_one_that_the_proxy_names():
    admission = Admission(limits=LIMITS)
    with ExitStack() as calls:
        for _ in range(3):
            calls.enter_context(admission.watch({"x-forwarded-for": "198.51.100.4"}, HERE))
        with pytest.raises(Overloaded):
            calls.enter_context(admission.watch({"x-forwarded-for": "198.51.100.4", "x-client-id": "another"}, HERE))
        calls.enter_context(admission.watch({"x-forwarded-for": "198.51.100.5"}, HERE))


def test_an_ingress_of_one_machine_tells_other_machines_nothing_of_its_health():
    admission = Admission(local_only=True)
    for enter in (lambda: admission.question({}, ELSEWHERE), lambda: admission.watch({}, ELSEWHERE).__enter__()):
        with pytest.raises(Forbidden):
            enter()
    admission.question({}, HERE)


# Questions of health


def refused(questions, host):
    try:
        questions.ask(host)
    except Overloaded as error:
        return str(error)
    return ""


def test_a_host_has_so_many_questions_in_a_window_and_the_next_window_is_new():
    """10 in 10 s: the eleventh, 4 s after the first, hears of 6 s; the bound of all, 1,000, is not met."""
    clock = TickingClock()
    questions = Questions(QuestionLimits(window_s=10, max_per_host=10, max_questions=1000), clock)
    assert [refused(questions, "a") for _ in range(10)] == [""] * 10
    clock.now_s += 4.0
    assert refused(questions, "a").endswith("10 questions from one host in 10 s without a key: try again in 6.0 s")
    assert refused(questions, "b") == ""
    clock.now_s += 6.0
    assert refused(questions, "a") == ""


def test_a_flood_from_many_addresses_costs_a_probe_no_answer_and_is_bounded():
    """1,000 in a window. 99 hosts ask 50 times: 10 answers each and a few more. A probe that asks once a second then
    has its share of 1,000 / 100 = 10. All answers together are 2,000 at most."""
    questions = Questions(QuestionLimits(window_s=10, max_per_host=500, max_questions=1000), TickingClock())
    flood = [refused(questions, f"host-{number}") for _ in range(50) for number in range(99)]
    assert [refused(questions, "probe") for _ in range(10)] == [""] * 10
    assert "at most 1000 questions in 10 s" in refused(questions, "probe")
    assert 1000 <= flood.count("") <= 2000


def test_a_flood_of_ever_new_addresses_is_bounded_too():
    """3,000 hosts with one question each: every further share would be less than one."""
    questions = Questions(QuestionLimits(window_s=10, max_per_host=500, max_questions=1000), TickingClock())
    assert [refused(questions, f"host-{number}") for number in range(3000)].count("") == 1000
    assert len(questions._asked) == 1000


@pytest.mark.parametrize(
    ("askers", "period_s"),
    [
        pytest.param(100, 1.0, id="probes of Kubernetes, or grpc_health_probe in them, at their shortest period"),
        pytest.param(200, 2.0, id="HAProxy's default interval from as many balancers"),
    ],
)
def test_honest_askers_never_meet_the_bounds(askers, period_s):
    """An hour of each, all behind one address: 100 a second are 1,000 in a window."""
    clock = TickingClock()
    admission = Admission(clock=clock)
    for _ in range(int(3600 / period_s)):
        for _ in range(askers):
            admission.question({"x-forwarded-for": "192.0.2.1"}, HERE)
        clock.now_s += period_s


# On a gRPC server, as Serve's replicas have it


class Ingress(GrpcInferenceService, GrpcHealthService):
    def __init__(self, service):
        state = HealthState()
        state.set(True)
        GrpcInferenceService.__init__(self, service, raise_failures=False)
        GrpcHealthService.__init__(self, state, service.admission, raise_failures=False)
        Ingress.last = self


@asynccontextmanager
async def serving(tmp_path, admission):
    """Yields a channel to a server that registers and calls as Serve's replicas do, and the ingress behind it."""
    tokenizer = Tokenizer(write_tokenizer(tmp_path / "model"))
    ingress = Ingress(make_service(tokenizer, EchoBackend(), admission=admission))

    def factory(service_method, streaming_type):
        method = getattr(ingress, service_method.split("/")[-1], None)

        async def unary(request, context):
            return (await method(request, context)).SerializeToString()

        async def stream(request, context):
            async for response in method(request, context):
                yield response.SerializeToString()

        return stream if streaming_type.name == "UNARY_STREAM" else unary

    server = gRPCGenericServer(factory)
    add_inference_service(ingress, server)
    health_pb2_grpc.add_HealthServicer_to_server(ingress, server)
    enable_server_reflection(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(None)


async def code_of(call):
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


def test_hundreds_of_watchers_without_a_key_keep_nobody_from_an_answer(tmp_path, key):
    keys, metadata = key

    async def run():
        async with serving(tmp_path, Admission(keys, AdmissionLimits(max_calls=2, keyless=KEYLESS))) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            watches = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(610)]
            codes = await asyncio.gather(*(code_of(watch.read()) for watch in watches))
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            asked = [
                stub.Generate(pb.GenerateRequest(text="ab"), metadata=tuple(metadata.items())),
                stub.GetModelInfo(pb.GetModelInfoRequest(), metadata=tuple(metadata.items())),
                health.Check(health_pb2.HealthCheckRequest()),
                health.List(health_pb2.HealthListRequest()),
            ]
            assert [await code_of(call) for call in asked] == ["OK"] * 4
            assert codes.count("OK") == KEYLESS.max_calls_per_host
            ended = [watch for watch, code in zip(watches, codes, strict=True) if code != "OK"]
            assert {(await watch.code()).name for watch in ended} == {"RESOURCE_EXHAUSTED"}
            details = await ended[0].details()
            for watch in watches:
                watch.cancel()
            return details

    assert "without a key" in asyncio.run(run())


def test_a_flood_of_health_checks_is_refused_and_other_hosts_are_answered(tmp_path, key):
    """5 of a host in 10 s, Check and List together; the sixth hears when the window ends."""
    keys, metadata = key
    clock = TickingClock()
    limits = AdmissionLimits(questions=QuestionLimits(window_s=10, max_per_host=5, max_questions=1000))

    async def run():
        async with serving(tmp_path, Admission(keys, limits, clock=clock)) as channel:
            health = health_pb2_grpc.HealthStub(channel)

            def ask(host, method="Check"):
                request = health_pb2.HealthCheckRequest() if method == "Check" else health_pb2.HealthListRequest()
                return getattr(health, method)(request, metadata=(("x-forwarded-for", host),))

            codes = []
            for method in ("Check", "List", "Check", "List", "Check", "Check", "List"):
                last = ask("a", method)
                codes.append(await code_of(last))
            hint = dict(await last.trailing_metadata())["grpc-retry-pushback-ms"]
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            answer = stub.Generate(pb.GenerateRequest(text="ab"), metadata=tuple(metadata.items()))
            others = [await code_of(ask("b")), await code_of(answer)]
            clock.now_s += 10.0
            return codes, hint, others, await code_of(ask("a"))

    assert asyncio.run(run()) == (["OK"] * 5 + ["RESOURCE_EXHAUSTED"] * 2, "10000", ["OK", "OK"], "OK")


def test_a_watcher_that_leaves_makes_room_for_another(tmp_path):
    async def run():
        async with serving(tmp_path, Admission(limits=LIMITS)) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            for _ in range(3):
                watches = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(3)]
                assert [(await watch.read()).status for watch in watches] == [1, 1, 1]
                for watch in watches:
                    watch.cancel()
                deadline = time.monotonic() + 20
                while True:  # the server hears of it a little later
                    last = health.Watch(health_pb2.HealthCheckRequest(service="unknown"))
                    if await code_of(last.read()) == "OK":
                        break
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0.05)
                last.cancel()
                await asyncio.sleep(0.1)

    asyncio.run(run())


METHODS = (
    "Generate", "Score", "Embed", "Classify", "ClassifyTokens", "AnswerSpan", "Tokenize", "Detokenize", "GetModelInfo",
    "GenerateStream",
)  # fmt: skip


def begin(channel, method, metadata):
    """A call that has sent no message yet."""
    path = f"/{SERVICE_NAME}/{method}"
    kind = channel.stream_stream if method == "GenerateStream" else channel.stream_unary
    return kind(path)(metadata=tuple(metadata.items()), timeout=30)


@pytest.fixture
def refused_early(monkeypatch):
    """As in a replica, whose servers find the ingress of their process."""
    monkeypatch.setattr(proxy, "_ingress", lambda: Ingress.last)


@pytest.mark.usefixtures("refused_early")
def test_without_a_key_no_message_is_read(tmp_path, key):
    """The calls are refused though they have sent none, which could be 64 MiB."""

    async def run():
        async with serving(tmp_path, Admission(key[0])) as channel:
            return [(await begin(channel, method, {}).code()).name for method in METHODS]

    assert asyncio.run(run()) == ["UNAUTHENTICATED"] * len(METHODS)


@pytest.mark.usefixtures("refused_early")
def test_a_caller_that_guesses_keys_hears_when_to_come_again(tmp_path, key):
    async def run():
        async with serving(tmp_path, Admission(key[0], LIMITS, clock=TickingClock())) as channel:
            for _ in range(KEYLESS.calls_per_minute):
                await begin(channel, "Generate", {}).code()
            call = begin(channel, "GetModelInfo", {})
            return (await call.code()).name, dict(await call.trailing_metadata())["grpc-retry-pushback-ms"]

    assert asyncio.run(run()) == ("RESOURCE_EXHAUSTED", "1000")


@pytest.mark.usefixtures("refused_early")
def test_with_a_key_the_message_is_read_and_answered_once(tmp_path, key):
    keys, metadata = key

    async def run():
        async with serving(tmp_path, Admission(keys)) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            pairs = tuple(metadata.items())
            answer = await stub.Generate(pb.GenerateRequest(text="ab"), metadata=pairs)
            stream = stub.GenerateStream(pb.GenerateStreamRequest(text="ab"), metadata=pairs)
            return answer.text, "".join([piece.text async for piece in stream])

    assert asyncio.run(run()) == ("ab", "ab")


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
def test_a_call_whose_message_does_not_come_ends(tmp_path, key, method, monkeypatch):
    monkeypatch.setattr(grpc_gate, "MESSAGE_TIMEOUT_S", 0.1)
    keys, metadata = key

    async def run():
        async with serving(tmp_path, Admission(keys)) as channel:
            silent, empty = (begin(channel, method, metadata) for _ in range(2))
            await empty.done_writing()
            return (await silent.code()).name, (await empty.code()).name

    assert asyncio.run(run()) == ("DEADLINE_EXCEEDED", "INVALID_ARGUMENT")
