"""`moe-cluster eval --address` against the real handlers behind a grpcio server, with known log-probabilities."""

import asyncio
import json
import math
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from serving_fakes import HELLO, MAX_MODEL_LEN, byte_ids, make_service, write_tokenizer
from test_grpc_server import FakeContext
from test_results_served import NumbersBackend

from cluster import cli
from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.serving.grpc.handlers import GrpcInferenceService
from cluster.serving.grpc.registration import SERVICE_NAME
from cluster.serving.text.tokenizer import Tokenizer
from cluster.wire import RETRY_KEY

METHODS = {"Score": pb.ScoreResponse, "Tokenize": pb.TokenizeResponse, "GetModelInfo": pb.GetModelInfoResponse}


LONG_CONTEXT = 1 << 16


@pytest.fixture
def server(tmp_path, request):
    """Gives its address, and the backend; a token's log-probability is minus its id. Parameters: the service's."""
    backend, options = NumbersBackend(), getattr(request, "param", {})
    backend.busy = 0  # calls that the server has no room for
    service = make_service(Tokenizer(write_tokenizer(tmp_path)), backend, **options)

    def handler(method, response):
        def answer(request, context):
            if method == "Score" and backend.busy:
                backend.busy -= 1
                context.set_trailing_metadata([(RETRY_KEY, "5")])
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
            return asyncio.run(getattr(GrpcInferenceService(service), method)(request, FakeContext()))

        return grpc.unary_unary_rpc_method_handler(answer, response_serializer=response.SerializeToString)

    server = grpc.server(ThreadPoolExecutor(1))
    handlers = {method: handler(method, response) for method, response in METHODS.items()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", backend
    server.stop(None)


def test_windows_are_scored_by_the_server(server, tmp_path, capsys):
    """Windows 1 2 3 4 and 3 4 5: means 3 and 5 over three tokens and one, of which the guide counts three."""
    address, backend = server
    (tmp_path / "ids").write_text("1 2 3\n4, 5")
    arguments = ["--token-ids", str(tmp_path / "ids"), "--context", "4", "--stride", "2", "--json"]
    assert cli.main(["eval", "--address", address, *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["perplexity"] == pytest.approx(math.exp(3))
    assert found["token_perplexity"] == pytest.approx(math.exp(3.5))
    assert sorted(request.prompt_token_ids for request in backend.requests) == [(1, 2, 3, 4), (3, 4, 5)]
    assert {request.wants for request in backend.requests} == {"token_logprobs"}


def test_a_busy_servers_windows_are_sent_again(server, tmp_path, capsys):
    address, backend = server
    backend.busy = 3
    (tmp_path / "ids").write_text("1 2 3 4 5")
    arguments = ["--token-ids", str(tmp_path / "ids"), "--context", "4", "--stride", "2", "--json"]
    assert cli.main(["eval", "--address", address, *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] == pytest.approx(math.exp(3))
    assert (backend.busy, len(backend.requests)) == (0, 2)


def test_a_text_is_tokenized_by_the_server_and_its_context_is_the_default(server, tmp_path, capsys):
    address, backend = server
    (tmp_path / "text").write_text("ab" * MAX_MODEL_LEN)
    assert cli.main(["eval", "--address", address, "--text", str(tmp_path / "text")]) == 0
    ids = [token for request in sorted(backend.requests, key=lambda r: r.called) for token in request.prompt_token_ids]
    assert f"{len(ids)} tokens in" in capsys.readouterr().out
    assert {len(request.prompt_token_ids) for request in backend.requests} == {MAX_MODEL_LEN}


@pytest.mark.parametrize("server", [{"max_request_bytes": 1 << 20, "max_model_len": LONG_CONTEXT}], indirect=True)
def test_a_text_longer_than_a_request_is_tokenized_in_parts(server, tmp_path, capsys):
    """1.35 MB, where a request has 1 MiB: "hello " 225,000 times, a token of the word and one of the space each."""
    address, backend = server
    (tmp_path / "text").write_text("hello " * 225_000)
    windows = ["--context", str(LONG_CONTEXT), "--stride", str(LONG_CONTEXT)]
    assert cli.main(["eval", "--address", address, "--text", str(tmp_path / "text"), *windows]) == 0
    ids = [token for request in backend.requests for token in request.prompt_token_ids]
    assert sorted(ids) == sorted([HELLO, *byte_ids(" ")] * 225_000)
    assert "450,000 tokens in 7 windows" in capsys.readouterr().out


def test_a_context_beyond_the_servers_is_refused(server, tmp_path, capsys):
    (tmp_path / "ids").write_text("[1, 2, 3]")
    assert cli.main(["eval", "--address", server[0], "--token-ids", str(tmp_path / "ids"), "--context", "65"]) == 2
    assert f"context is 65, the model's has {MAX_MODEL_LEN} tokens" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_named(tmp_path, capsys):
    (tmp_path / "ids").write_text("[1, 2, 3]")
    assert cli.main(["eval", "--address", "127.0.0.1:1", "--token-ids", str(tmp_path / "ids")]) == 1
    assert "no server answers at 127.0.0.1:1" in capsys.readouterr().err
