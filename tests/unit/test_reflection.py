"""Reflection, which needs no key: bounded in streams, in their messages and bytes, and answered as clients expect."""

import asyncio
from contextlib import asynccontextmanager
from unittest.mock import Mock

import grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from ray.serve._private.grpc_util import enable_server_reflection, gRPCGenericServer
from serving_fakes import TickingClock

from cluster.runtime.front.serve_proxy import add_inference_service, bound_reflection
from cluster.serving.admission.admission import Admission, AdmissionLimits
from cluster.serving.admission.keyless import KeylessLimits
from cluster.serving.grpc import keyless

LIMITS = AdmissionLimits(keyless=KeylessLimits(max_calls=4, max_calls_per_host=3, calls_per_minute=60))


@asynccontextmanager
async def reflecting(limits):
    """Yields a stub of the reflection of a server, bounded as ours is. limits: None for ours."""
    server = gRPCGenericServer(lambda **_: None)
    if limits is None:
        add_inference_service(Mock(), server)
    else:
        bound_reflection(server, Admission(limits=limits, clock=TickingClock()))
    enable_server_reflection(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield reflection_pb2_grpc.ServerReflectionStub(channel)
    await server.stop(None)


async def names(call):
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    response = await call.read()
    return [service.name for service in response.list_services_response.service]


async def code_of(call):
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


def test_reflection_answers_and_its_streams_are_bounded():
    async def run():
        async with reflecting(LIMITS) as stub:
            taken = [stub.ServerReflectionInfo() for _ in range(3)]
            answers = [await names(call) for call in taken]
            # Not written to: a write that the refusal overtakes makes the client's status INTERNAL.
            refused = [(await stub.ServerReflectionInfo().code()).name for _ in range(2)]
            for call in taken:
                call.cancel()
            return answers, refused

    answers, refused = asyncio.run(run())
    assert answers == [["grpc.reflection.v1alpha.ServerReflection"]] * 3
    assert refused == ["RESOURCE_EXHAUSTED"] * 2


def test_a_host_has_few_streams_of_reflection_at_a_time():
    """4 of one host, 32 of all: the fifth is refused, and of nine hosts the last."""

    def begin(stub, host):
        return stub.ServerReflectionInfo(metadata=(("x-forwarded-for", host),))

    async def run():
        async with reflecting(None) as stub:
            taken = [begin(stub, "host-0") for _ in range(4)]
            listed = [await names(call) for call in taken]
            details = [await begin(stub, "host-0").details()]
            others = [begin(stub, f"host-{number}") for number in range(1, 8) for _ in range(4)]
            listed += [await names(call) for call in others]
            details.append(await begin(stub, "host-8").details())
            for call in [*taken, *others]:
                call.cancel()
            return listed, details

    listed, details = asyncio.run(run())
    services = [
        "grpc.reflection.v1alpha.ServerReflection", "inference.GRPCInferenceService", "moecluster.v1.InferenceService",
        "vllm.grpc.engine.VllmEngine",
    ]  # fmt: skip
    assert listed == [services] * 32
    assert "at most 4 calls without a key at a time from one host" in details[0]
    assert "at most 32 calls without a key at a time" in details[1]


def test_a_stream_of_reflection_has_so_many_messages_a_minute():
    """60 calls a minute: the stream is one, and each of its messages is one. The next one ends it."""

    async def run():
        async with reflecting(LIMITS) as stub:
            call = stub.ServerReflectionInfo()
            answers = [await names(call) for _ in range(59)]
            await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            return answers, await code_of(call.read()), await call.details()

    answers, code, details = asyncio.run(run())
    assert answers == [["grpc.reflection.v1alpha.ServerReflection"]] * 59
    assert code == "RESOURCE_EXHAUSTED"
    assert "60 calls without a key a minute" in details


def test_a_message_of_reflection_has_so_many_bytes():
    """4,096 with the field's number and its length, 3 bytes."""

    async def run():
        async with reflecting(LIMITS) as stub:
            call = stub.ServerReflectionInfo()
            codes = []
            for size in (4093, 4094):
                await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol="x" * size))
                codes.append(await code_of(call.read()))
            return codes, await call.details()

    codes, details = asyncio.run(run())
    assert codes == ["OK", "RESOURCE_EXHAUSTED"]
    assert details == "a message without a key has at most 4096 bytes, not 4097"


def test_a_large_message_of_reflection_counts_as_many_calls():
    """60 calls a minute: a stream is one, and 409,600 bytes are 100 and one. The host has then 42 too many, and one
    call comes back a second."""

    async def run():
        async with reflecting(LIMITS) as stub:
            call = stub.ServerReflectionInfo()
            await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol="x" * 409_600))
            codes = [await code_of(call.read())]
            again = stub.ServerReflectionInfo()
            return [*codes, (await again.code()).name], dict(await again.trailing_metadata())["grpc-retry-pushback-ms"]

    assert asyncio.run(run()) == (["RESOURCE_EXHAUSTED"] * 2, "43000")


def test_a_stream_of_reflection_without_messages_ends(monkeypatch):
    monkeypatch.setattr(keyless, "MESSAGE_TIMEOUT_S", 0.1)

    async def run():
        async with reflecting(LIMITS) as stub:
            return (await stub.ServerReflectionInfo().code()).name

    assert asyncio.run(run()) == "DEADLINE_EXCEEDED"


def test_a_damaged_message_of_reflection_is_refused():
    async def run():
        async with reflecting(LIMITS) as stub:
            stub.ServerReflectionInfo._request_serializer = None
            call = stub.ServerReflectionInfo()
            await call.write(b"\xff")
            return (await call.code()).name

    assert asyncio.run(run()) == "INVALID_ARGUMENT"


def test_a_usual_reflection_client_is_answered():
    """As grpcurl's describe: the list, the file of each service, then each file that it needs, in one stream."""
    service, file = "grpc.reflection.v1alpha.ServerReflection", reflection_pb2.DESCRIPTOR

    async def run():
        async with reflecting(AdmissionLimits()) as stub:
            call = stub.ServerReflectionInfo()
            listed = await names(call)
            found = []
            for request in ({"file_containing_symbol": service}, {"file_by_filename": file.name}):
                await call.write(reflection_pb2.ServerReflectionRequest(**request))
                found.append((await call.read()).file_descriptor_response.file_descriptor_proto[0])
            await call.done_writing()
            return listed, found, await call.read(), (await call.code()).name

    assert asyncio.run(run()) == ([service], [file.serialized_pb] * 2, grpc.aio.EOF, "OK")
