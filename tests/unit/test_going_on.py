"""The client goes on with an answer whose connection breaks: a pause for its caller, and no difference."""

import itertools
import math
from argparse import ArgumentParser
from contextlib import closing

import grpc
import pytest

from cluster.client import options
from cluster.client.going_on import MAX_WAIT_S, PATIENCE_S, Patience, going_on
from cluster.client.grpc_client import Client
from cluster.errors import BrokenStream, ClusterError, InvalidRequest, Overloaded, Unavailable
from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.types import SamplingParams, TextDelta

BROKEN = BrokenStream("the connection broke off")
ANSWER = (7, 8, 9, 10)


class Server:
    """Answers with ANSWER, a token a piece. Each stream ends as its part of the script says: with an error after so
    many tokens, or, where the script is over, with the answer's end."""

    def __init__(self, *script):
        self.script, self.asked, self.now_s, self.slept = list(script), [], 0.0, []

    def ask(self, received):
        self.asked.append(received)
        life, error = self.script.pop(0) if self.script else (math.inf, None)
        rest = ANSWER[len(received) :]
        for index, token in enumerate(rest):
            if index == life:
                raise error
            yield TextDelta(token_ids=(token,), finish_reason="length" if index == len(rest) - 1 else None)
        if error is not None:
            raise error

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now_s += seconds

    def patience(self):
        return Patience(clock=lambda: self.now_s, sleep=self.sleep)

    def answer(self, patience=None):
        pieces = going_on(self.ask, patience or self.patience())
        return tuple(token for piece in pieces for token in piece.token_ids)


def test_an_answer_goes_on_behind_what_has_come_wherever_it_breaks():
    server = Server((1, BROKEN), (0, Unavailable("no ingress")), (2, BROKEN))
    assert server.answer() == ANSWER
    assert server.asked == [(), (7,), (7,), (7, 8, 9)]
    assert server.slept == [0.05, 0.1, 0.05]  # a token came before the third wait


def test_an_answer_that_has_ended_is_whole_though_its_connection_breaks():
    server = Server((4, BROKEN))
    assert (server.answer(), server.asked) == (ANSWER, [()])


def test_a_busy_server_is_asked_again_when_it_says():
    server = Server((1, BROKEN), (0, Overloaded("full", 3.0)))
    assert (server.answer(), server.slept) == (ANSWER, [0.05, 3.0])


@pytest.mark.parametrize("error", [Overloaded("full", math.inf), Overloaded("full", PATIENCE_S)])
def test_a_server_that_will_stay_busy_is_not_waited_for(error):
    server = Server((1, BROKEN), (0, error))
    with pytest.raises(Overloaded, match="full"):
        server.answer()
    assert server.slept == [0.05]


def test_patience_ends_and_the_last_reason_is_told():
    server = Server((2, BROKEN), *[(0, Unavailable("no server answers"))] * 1000)
    with pytest.raises(Unavailable, match="no server answers"):
        server.answer()
    assert PATIENCE_S - MAX_WAIT_S <= sum(server.slept) <= PATIENCE_S
    assert max(server.slept) == MAX_WAIT_S


@pytest.mark.parametrize("error", [InvalidRequest("no", "text"), ClusterError("INTERNAL: no")])
def test_a_failure_of_the_request_is_one_at_once(error):
    server = Server((2, error))
    with pytest.raises(type(error), match="no"):
        server.answer()
    assert (len(server.asked), server.slept) == (1, [])


@pytest.mark.parametrize("error", [Unavailable("nobody"), Overloaded("full", 1.0)])
def test_an_answer_that_never_began_is_its_callers_matter(error):
    server = Server((0, error))
    with pytest.raises(type(error)):
        server.answer()
    assert server.slept == []


def test_a_stream_that_ends_without_a_reason_is_a_broken_one():
    server = Server()
    whole = server.ask
    server.ask = lambda received: (piece for piece in itertools.islice(whole(received), None if received else 2))
    assert server.answer() == ANSWER


def test_patience_begins_with_the_break_however_long_the_answer_had_waited_before():
    server = Server((1, BROKEN))
    ask = server.ask

    def slowly(received):
        server.now_s += 10 * PATIENCE_S
        yield from ask(received)

    server.ask = slowly
    assert server.answer() == ANSWER


def test_a_thousand_answers_do_not_wait_for_a_dead_server_in_turn():
    """The first one waits, the others not; after a word of the server the next one would."""
    server = Server()
    patience = server.patience()
    assert server.answer(patience) == ANSWER
    server.script = [(0, Unavailable("nobody"))] * 100_000
    for _ in range(1000):
        with pytest.raises(Unavailable):
            server.answer(patience)
    assert server.now_s <= PATIENCE_S
    server.script = []
    assert server.answer(patience) == ANSWER
    server.script = [(0, Unavailable("nobody"))] * 3
    assert server.answer(patience) == ANSWER


def test_a_refusal_that_nobody_waits_for_takes_no_patience_from_later_answers():
    """A full server, then long nothing, then a break before the first token."""
    server = Server((0, Overloaded("full", 1.0)))
    patience = server.patience()
    with pytest.raises(Overloaded):
        server.answer(patience)
    server.now_s += 10 * PATIENCE_S
    server.script = [(0, BROKEN)]
    assert server.answer(patience) == ANSWER


def test_a_busy_server_is_not_a_missed_one():
    """One answer waits through a break and a queue; the break of another one has its own patience."""
    server = Server()
    patience = server.patience()
    server.script = [(1, BROKEN), (0, Overloaded("full", PATIENCE_S - 1)), (0, BROKEN)]
    with pytest.raises(BrokenStream):
        server.script += [(0, BROKEN)] * 100
        server.answer(patience)
    server.script = [(0, BROKEN), (0, BROKEN)]
    assert server.answer(patience) == ANSWER


def test_closing_it_closes_the_stream_under_way():
    closed = []

    def ask(received):
        try:
            yield TextDelta(token_ids=(1,))
            yield TextDelta(token_ids=(2,))
        finally:
            closed.append(received)

    with closing(going_on(ask, Patience())) as pieces:
        next(pieces)
    assert closed == [()]


# Over gRPC


class Failure(grpc.RpcError):
    def __init__(self, code, details):
        self._code, self._details = code, details

    def code(self):
        return self._code

    def details(self):
        return self._details

    def trailing_metadata(self):
        return ()


class Call:
    """life: messages before the failure."""

    def __init__(self, request, life, failure, knows):
        self._request, self._life, self._failure, self._knows = request, life, failure, knows
        self.cancelled = False

    def __iter__(self):
        num_continued = len(self._request.continue_from) if self._knows else 0
        rest = ANSWER[num_continued:]
        for index, token in enumerate(rest):
            if index == self._life:
                raise self._failure
            reason = pb.FINISH_REASON_LENGTH if index == len(rest) - 1 else pb.FINISH_REASON_UNSPECIFIED
            yield pb.GenerateStreamResponse(token_ids=[token], finish_reason=reason, num_continued=num_continued)
            num_continued = 0

    def cancel(self):
        self.cancelled = True


class Stub:
    """knows: continue_from."""

    def __init__(self, *script, knows=True):
        self.script, self.knows, self.requests, self.calls = list(script), knows, [], []

    def GenerateStream(self, request, metadata):
        self.requests.append(pb.GenerateStreamRequest.FromString(request.SerializeToString()))
        life, failure = self.script.pop(0) if self.script else (math.inf, None)
        self.calls.append(Call(self.requests[-1], life, failure, self.knows))
        return self.calls[-1]


@pytest.fixture
def client():
    with Client("127.0.0.1:1", patience_s=0.1) as one:
        yield one


def tokens(client, stub, params=None):
    client._stub = stub
    return tuple(token for piece in client.stream("hello", params or SamplingParams()) for token in piece.token_ids)


# As a client of HAProxy gets them: of a killed HAProxy, of a killed ingress behind it, of one that is renewed.
BREAKS = [
    (grpc.StatusCode.UNAVAILABLE, "Socket closed"),
    (grpc.StatusCode.UNAVAILABLE, "recvmsg:Connection reset by peer"),
    (grpc.StatusCode.CANCELLED, "CANCELLED"),
    (grpc.StatusCode.CANCELLED, "Received RST_STREAM with error code 8"),
    (grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2"),
    (grpc.StatusCode.UNKNOWN, "Stream removed"),
]


@pytest.mark.parametrize(("code", "details"), BREAKS)
@pytest.mark.parametrize("life", [0, 1, 3])
def test_a_stream_over_grpc_goes_on_with_the_seed_that_the_client_drew(client, code, details, life):
    stub = Stub((life, Failure(code, details)))
    assert tokens(client, stub) == ANSWER
    assert [tuple(request.continue_from) for request in stub.requests] == [(), ANSWER[:life]]
    first, second = (request.sampling_params for request in stub.requests)
    assert first.HasField("seed")
    assert first == second
    assert all(call.cancelled for call in stub.calls)


def test_a_given_seed_stays(client):
    stub = Stub()
    tokens(client, stub, SamplingParams(seed=5))
    assert stub.requests[0].sampling_params.seed == 5


def test_for_a_bench_a_break_is_the_answers_end():
    """And it draws no seed, which would be another way to choose."""
    with options.connect(bench_arguments(), goes_on=False) as client:
        stub = Stub((1, Failure(*BREAKS[0])))
        with pytest.raises(BrokenStream):
            tokens(client, stub)
    assert len(stub.requests) == 1
    assert not stub.requests[0].sampling_params.HasField("seed")


def bench_arguments():
    parser = ArgumentParser()
    options.add_arguments(parser)
    return parser.parse_args(["--address", "127.0.0.1:1"])


def test_a_servers_word_is_no_break(client):
    stub = Stub((2, Failure(grpc.StatusCode.CANCELLED, "request r was cancelled by the server")))
    with pytest.raises(ClusterError, match="cancelled by the server"):
        tokens(client, stub)
    assert len(stub.requests) == 1


def test_who_was_never_reached_is_not_waited_for_and_who_was_is(client):
    nobody = Failure(grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses; last error: Connection refused")
    with pytest.raises(Unavailable, match="no server answers"):
        tokens(client, Stub((0, nobody)))
    tokens(client, Stub())
    assert tokens(client, Stub((0, nobody))) == ANSWER


def test_an_older_server_which_would_begin_again_is_no_help(client):
    with pytest.raises(Unavailable, match="older version"):
        tokens(client, Stub((1, Failure(*BREAKS[0])), knows=False))
