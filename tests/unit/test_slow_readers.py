"""Clients that read slowly, or not at all: each loses its own stream, in bounded memory, and nobody else notices."""

import asyncio
import contextvars
import math
import os
import queue
import threading
import time
from collections import Counter
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import fields
from types import SimpleNamespace

import grpc
import pytest
import ray
import virtual_time
from grpc_health.v1 import health_pb2, health_pb2_grpc
from haproxy_tools import Healthz, haproxy
from ray.serve.generated import serve_pb2_grpc
from serving_fakes import EchoBackend, make_service, write_tokenizer

from cluster.errors import Overloaded, ReplicaUnavailable
from cluster.process_identity import identity
from cluster.runtime.front import attention_replica
from cluster.runtime.front.attention_replica import AttentionReplica
from cluster.runtime.front.relay import relay_cancels
from cluster.serving.text.prompts import Prompt
from cluster.serving.text.tokenizer import Tokenizer
from cluster.serving.update_queue import LOGPROB_BYTES, TOKEN_BYTES, UpdateQueue, merge_updates, size_of
from cluster.types import Logprobs, SamplingParams, SequenceUpdate

MESSAGE = b"x" * 10_000
NOT_READING = (("grpc.http2.lookahead_bytes", 5), ("grpc.http2.bdp_probe", 0))  # HTTP/2's window is next to nothing
STALLED = 20


def update(*token_ids, top=0, finish_reason=None):
    entries = tuple((n, -float(n)) for n in range(top))
    logprobs = tuple(Logprobs(token_id, -1.0, entries) for token_id in token_ids) if top else ()
    return SequenceUpdate(request_id="a", token_ids=token_ids, logprobs=logprobs, finish_reason=finish_reason)


# The queue of an attention replica


def test_gathered_updates_come_out_as_one_and_make_room_again():
    """Two tokens with a log-probability of three entries each: 2 tokens and 2 x 4 pairs of numbers."""
    assert size_of(update(5, 6, top=3)) == 2 * TOKEN_BYTES + 8 * LOGPROB_BYTES

    async def run():
        queue = UpdateQueue(10 * TOKEN_BYTES)
        for first in (0, 8, 16):
            assert all(queue.put(update(token)) for token in range(first, first + 8))
            assert (await queue.take()).token_ids == tuple(range(first, first + 8))

    asyncio.run(run())


def test_a_full_queue_drops_its_updates_for_an_error_that_says_how_to_go_on():
    async def run():
        queue = UpdateQueue(3 * TOKEN_BYTES)
        found = [queue.put(update(token)) for token in range(6)]
        assert found == [True, True, True, False, True, True]  # false once: the caller of put then ends the sequence
        queue.put(update(9, finish_reason="length"))
        taken = await queue.take()
        assert (taken.token_ids, taken.finish_reason) == ((), "error")
        assert isinstance(taken.error, Overloaded)
        assert "4 tokens" in str(taken.error)
        assert "max_unread_bytes" in str(taken.error)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await queue.take()

    asyncio.run(run())


def test_log_probabilities_fill_a_queue_sooner():
    bound = 100 * TOKEN_BYTES
    assert UpdateQueue(bound).put(update(*range(100)))
    assert not UpdateQueue(bound).put(update(*range(3), top=20))


def test_an_error_of_the_replica_finds_room_in_a_full_queue():
    async def run():
        queue = UpdateQueue(TOKEN_BYTES)
        queue.put(update(1))
        lost = SequenceUpdate(request_id="a", finish_reason="error", error=ReplicaUnavailable("gone"))
        assert queue.put(lost)
        assert await queue.take() == merge_updates([update(1), lost])

    asyncio.run(run())


def test_updates_that_are_joined_keep_all_that_they_tell():
    """Each field of an update, also one that comes later: it is made of two that have it, and of two whose last has."""
    every = {
        "request_id": "r", "token_ids": (1,), "logprobs": (Logprobs(1, -1.0),), "finish_reason": "length",
        "error": OSError(), "replica": "a", "numbers": object(), "constrained": True, "adapter": "law",
        "prefixes": (b"p",), "cached_tokens": 16,
    }  # fmt: skip
    assert set(every) == {field.name for field in fields(SequenceUpdate)}
    whole, bare = SequenceUpdate(**every), SequenceUpdate(request_id="r", finish_reason="cancelled")
    twice = {"token_ids": (1, 1), "logprobs": every["logprobs"] * 2}
    assert merge_updates([whole, whole]) == SequenceUpdate(**(every | twice))
    assert merge_updates([SequenceUpdate(request_id="r"), whole]) == whole
    ended = merge_updates([whole, bare])
    assert (ended.token_ids, ended.constrained, ended.adapter, ended.finish_reason) == ((1,), True, "law", "cancelled")
    assert ended.cached_tokens == 16


def test_the_replica_ends_an_overflowing_sequence_at_the_engine_once_and_no_other():
    cancelled = []
    replica = AttentionReplica.__new__(AttentionReplica)
    replica._context = contextvars.copy_context()
    replica.engine = SimpleNamespace(cancel=SimpleNamespace(remote=cancelled.append))
    replica._streams = {name: UpdateQueue(10 * TOKEN_BYTES) for name in ("unread", "read")}

    async def run():
        for token in range(30):
            replica._share(
                SequenceUpdate(request_id=name, token_ids=(token,)) for name in ("unread", "read", "left already")
            )
            assert (await replica._streams["read"].take()).token_ids == (token,)

    asyncio.run(run())
    assert cancelled == [["unread"]]


class Unreachable:
    """An engine that Ray cannot reach for some seconds; then it answers once, and dies. `asked`: when."""

    def __init__(self, seconds):
        self._seconds = seconds
        self.poll, self.asked = SimpleNamespace(remote=self._poll), []

    async def _poll(self, wait_s, received):
        self.asked.append(asyncio.get_running_loop().time())
        if self.asked[-1] < self._seconds:
            raise ray.exceptions.ActorUnavailableError("no connection", None)
        if received:
            raise ray.exceptions.RayActorError
        return 1, [update(7)]


class Ended(Exception):
    """The process has ended."""


@pytest.fixture
def replica(monkeypatch):
    """Its engine's process is this one. It ends with Ended, and keeps what it hands out in `given`."""

    def end(status):
        raise Ended

    monkeypatch.setattr(attention_replica.os, "_exit", end)
    monkeypatch.setattr(attention_replica.os, "kill", lambda pid, sign: None)
    replica = AttentionReplica.__new__(AttentionReplica)
    replica.name, replica._lost, replica._record, replica._streams, replica._tracing = "r", "", None, {}, None
    replica._engine_process, replica.given = identity(os.getpid()), []
    monkeypatch.setattr(replica, "_share", replica.given.extend)
    return replica


def until_its_end(replica):
    async def run():
        with pytest.raises(Ended):
            await replica._share_out()

    virtual_time.run(run)


def test_a_replica_asks_an_engine_that_cannot_be_reached_less_and_less_often(replica):
    """At 0, 0.05, 0.15, 0.35, 0.75, 1.55 and 3.15 s, then each 2 s: 28 times until a minute is over; and twice then."""
    replica.engine = Unreachable(60.0)
    until_its_end(replica)
    assert replica.given == [update(7)]
    assert len(replica.engine.asked) == 7 + 28 + 2


def test_a_replica_ends_whose_engine_cannot_be_reached_because_its_process_is_gone(replica):
    """Ray says no more than that while its head is away."""
    replica.engine = Unreachable(math.inf)
    replica._engine_process = identity(2**22 + 1)  # above Linux' largest pid
    until_its_end(replica)
    assert len(replica.engine.asked) == 1
    assert "is gone" in replica._lost


def test_the_client_of_an_ended_stream_gets_a_typed_error_and_the_log_says_so(tmp_path, caplog):
    queue = UpdateQueue(TOKEN_BYTES)
    queue.put(update(1, 2))
    backend = EchoBackend(script=[update(64), asyncio.run(queue.take())])
    service = make_service(Tokenizer(write_tokenizer(tmp_path)), backend)

    async def read():
        return [delta async for delta in service.stream(Prompt(text="a"), SamplingParams(), request_id="x")]

    with caplog.at_level("INFO", logger="cluster"), pytest.raises(Overloaded, match="reads too slowly"):
        asyncio.run(read())
    assert "request 'x' ended with resource_exhausted" in caplog.text


# The gRPC server


@asynccontextmanager
async def streaming(handler, **options):
    """Yields a client's method for `handler` behind `relay_cancels`."""
    server = grpc.aio.server()
    methods = {"Flood": grpc.unary_stream_rpc_method_handler(relay_cancels(handler, **options))}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Test", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=NOT_READING) as channel:
        yield channel.unary_stream("/test.Test/Flood")
    await server.stop(None)


def test_a_stream_that_nobody_reads_is_ended_and_its_client_learns_why_when_it_reads():
    ended = asyncio.Event()

    async def flood(request, context):
        try:
            while True:
                yield MESSAGE
        finally:
            ended.set()

    async def run():
        async with streaming(flood, unread_timeout_s=0.1) as method:
            call = method(b"")
            async with asyncio.timeout(20):
                await ended.wait()
                messages = []
                with pytest.raises(grpc.RpcError) as caught:
                    async for message in call:
                        messages.append(message)
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "has read nothing for 0.1 s" in caught.value.details()
            assert messages == [MESSAGE] * len(messages)

    asyncio.run(run())


def test_a_stream_without_news_is_not_a_slow_reader():
    """Time counts only while a message waits for its reader."""

    async def rare(request, context):
        yield b"first"
        await asyncio.sleep(0.3)
        yield b"last"

    async def run():
        async with streaming(rare, unread_timeout_s=0.1) as method:
            assert [message async for message in method(b"")] == [b"first", b"last"]

    asyncio.run(run())


def test_a_client_that_leaves_while_a_message_waits_ends_its_stream():
    ended = asyncio.Event()

    async def flood(request, context):
        try:
            while True:
                yield MESSAGE
        finally:
            ended.set()

    async def run():
        async with streaming(flood) as method:
            call = method(b"")
            await call.read()
            call.cancel()
            async with asyncio.timeout(20):
                await ended.wait()

    asyncio.run(run())


# HAProxy between them


async def check(request, context):
    return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


@contextmanager
def flooding_server():
    """A gRPC server in a thread with the health service and an endless stream; yields its port, and the number of
    messages that it has written."""
    written = Counter()

    async def flood(request, context):
        while True:
            yield MESSAGE
            written[request] += 1

    async def serve():
        server = grpc.aio.server()
        methods = {"Flood": grpc.unary_stream_rpc_method_handler(relay_cancels(flood))}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Test", methods),))
        health_pb2_grpc.add_HealthServicer_to_server(SimpleNamespace(Check=check, Watch=None, List=None), server)
        serve_pb2_grpc.add_RayServeAPIServiceServicer_to_server(Healthz(), server)
        done = asyncio.Event()
        loop = asyncio.get_running_loop()
        started.put((server.add_insecure_port("127.0.0.1:0"), lambda: loop.call_soon_threadsafe(done.set)))
        await server.start()
        await done.wait()
        await server.stop(None)

    started = queue.SimpleQueue()
    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    port, stop = started.get(timeout=60)
    try:
        yield port, written
    finally:
        stop()
        thread.join()


def until_still(written):
    """Whatever lies between the server's memory and its clients' is full."""
    before = None
    while len(written) < STALLED or before != written:
        before = Counter(written)
        time.sleep(0.2)


def test_behind_haproxy_clients_that_do_not_read_stop_no_other_stream_and_no_health_call(tmp_path):
    """HAProxy reads no more from a connection to an ingress when one of its streams cannot go on."""
    with flooding_server() as (backend, written), haproxy(tmp_path, backend) as port, ExitStack() as stack:

        def connect(number, *options):
            options = (*options, ("test.number", number))  # a connection of its own
            return stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{port}", options=options))

        unread = [connect(n, *NOT_READING).unary_stream("/test.Test/Flood")(b"unread %d" % n) for n in range(STALLED)]
        until_still(written)
        for number in range(STALLED, STALLED + 4):
            channel = connect(number)
            reading = channel.unary_stream("/test.Test/Flood")(b"read", timeout=60)
            assert [next(reading) for _ in range(300)] == [MESSAGE] * 300
            health = health_pb2_grpc.HealthStub(channel)
            assert health.Check(health_pb2.HealthCheckRequest(), timeout=60).status == 1
        assert all(call.is_active() for call in unread)
