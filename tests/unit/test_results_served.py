"""The rpcs whose answers are numbers, behind a grpcio server on loopback, with a backend whose numbers are known."""

import asyncio
import pickle
import struct
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from serving_fakes import (
    HELLO,
    IM_START,
    MAX_MODEL_LEN,
    VOCAB_SIZE,
    FakeMetrics,
    TickingClock,
    make_service,
    write_tokenizer,
)
from test_grpc_server import FakeContext

from cluster.client.grpc_client import Client
from cluster.errors import DeadlineExceeded, InvalidRequest, Overloaded, ShardUnavailable, Unavailable
from cluster.metrics import CollectorRegistry, IngressMetrics
from cluster.outcome import CALLS, Head, Numbers
from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.serving.admission.api_keys import ApiKeys, new_key
from cluster.serving.grpc.handlers import GrpcInferenceService
from cluster.serving.grpc.registration import SERVICE_NAME
from cluster.serving.outcomes import unit_vector
from cluster.serving.replay import ReplayingBackend
from cluster.serving.service import InferenceService
from cluster.serving.text.prompts import Prompt
from cluster.serving.text.tokenizer import Tokenizer
from cluster.serving.update_queue import UpdateQueue
from cluster.types import SequenceUpdate
from cluster.wire import RECEIVE_KEY

KINDS = {
    "token_logprobs": lambda ids: [-float(token) for token in ids[1:]],
    "last_hidden_state": lambda ids: [3.0, 4.0, float(ids[-1])],
    "mean_hidden_state": lambda ids: [sum(ids) / len(ids), 0.0],
    "label_logits": lambda ids: [0.0, float(ids[-1])],
    "token_label_logits": lambda ids: [[0.0, float(token % 2), 0.5] for token in ids],
    "span_logits": lambda ids: [[float(token == 64), float(token == 65)] for token in ids],
}
SEQUENCE = Head(kind="sequence_classification", labels=("bad", "good"), pad_token_id=0)
TOKENS = Head(kind="token_classification", labels=("even", "odd", "none"))
ANSWERS = Head(kind="question_answering", labels=("start", "end"))


class NumbersBackend:
    """A result by hand for each kind: a token's log-probability is minus its id. `script` replaces the updates."""

    def __init__(self, *script):
        self.script, self.requests, self.closed = script, [], []

    async def generate(self, request):
        self.requests.append(request)
        try:
            for update in self.script or [self.answer(request)]:
                if isinstance(update, Exception):
                    raise update
                yield update
        finally:
            self.closed.append(request.called)

    def answer(self, request):
        numbers = Numbers.of(np.array(KINDS[request.wants](request.prompt_token_ids)))
        return SequenceUpdate(request_id=request.request_id, numbers=numbers, finish_reason="stop")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def call(tokenizer, method, request, *, backend=None, metadata=(), **options):
    """(code's name, details, response) of a unary call."""
    service = make_service(tokenizer, backend or NumbersBackend(), **options)
    context = FakeContext(metadata)
    response = asyncio.run(getattr(GrpcInferenceService(service), method)(request.SerializeToString(), context))
    return context.code.name if context.code else "OK", context.details, response


def ids(*token_ids):
    return pb.TokenIds(ids=token_ids)


def test_score_gives_each_tokens_number_but_the_firsts(tokenizer):
    backend, metrics = NumbersBackend(), FakeMetrics()
    code, _, answer = call(
        tokenizer, "Score", pb.ScoreRequest(token_ids=ids(7, 8, 9), request_id="mine", timeout_ms=5000),
        backend=backend, metrics=metrics,
    )  # fmt: skip
    assert (code, answer.request_id, list(answer.token_ids)) == ("OK", "mine", [7, 8, 9])
    assert list(answer.logprobs) == [-8.0, -9.0]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 0)
    [asked] = backend.requests
    assert (asked.wants, asked.params.max_tokens, asked.name, asked.timeout_s) == ("token_logprobs", 1, "mine", 5.0)
    assert metrics.named("finished") == [("stop",)]
    assert metrics.named("prompt_tokens") == [(3,)]
    assert metrics.named("result") == [("Score",)]
    assert backend.closed == ["mine"]


def test_the_metrics_know_every_method_that_gives_numbers():
    registry = CollectorRegistry()
    metrics = IngressMetrics(registry)
    for method in CALLS.values():
        if method != "Generate":
            metrics.result(method)
    assert registry.get_sample_value("moecluster_results_total", {"method": "AnswerSpan"}) == 1
    assert registry.get_sample_value("moecluster_results_total", {"method": "Embed"}) == 3


def test_a_text_is_tokenized_as_for_generate_and_one_token_has_no_number(tokenizer):
    _, _, answer = call(tokenizer, "Score", pb.ScoreRequest(text="hello"))
    assert (list(answer.token_ids), list(answer.logprobs)) == ([HELLO], [])


def test_a_prompt_may_be_as_long_as_the_context(tokenizer):
    full = ids(*[1] * MAX_MODEL_LEN)
    assert len(call(tokenizer, "Score", pb.ScoreRequest(token_ids=full))[2].logprobs) == MAX_MODEL_LEN - 1
    code, details, _ = call(tokenizer, "Score", pb.ScoreRequest(token_ids=ids(*[1] * (MAX_MODEL_LEN + 1))))
    assert (code, details) == ("INVALID_ARGUMENT", "token_ids has 65 tokens, the context has 64")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [3 / np.sqrt(50), 4 / np.sqrt(50), 5 / np.sqrt(50)]),
        ({"pooling": pb.POOLING_LAST, "normalize": False}, [3.0, 4.0, 5.0]),
        ({"pooling": pb.POOLING_MEAN, "normalize": False}, [3.0, 0.0]),
        ({"pooling": pb.POOLING_MEAN}, [1.0, 0.0]),
    ],
)
def test_embed_pools_and_normalizes_as_asked(tokenizer, fields, expected):
    _, _, answer = call(tokenizer, "Embed", pb.EmbedRequest(token_ids=ids(1, 5), **fields))
    np.testing.assert_allclose(answer.embedding, expected, rtol=1e-6)


def test_zeros_stay_zeros():
    assert unit_vector(np.zeros(3, dtype=np.float32)).tolist() == [0, 0, 0]


def test_classify_gives_logits_probabilities_and_the_label_of_the_last_token_that_is_no_padding(tokenizer):
    request, backend = pb.ClassifyRequest(token_ids=ids(7, 2, 0, 0)), NumbersBackend()
    code, _, answer = call(tokenizer, "Classify", request, head=SEQUENCE, backend=backend)
    assert (code, list(answer.logits), answer.label) == ("OK", [0.0, 2.0], "good")
    np.testing.assert_allclose(answer.probs, [1 / (1 + np.e**2), np.e**2 / (1 + np.e**2)], rtol=1e-6)
    assert backend.requests[0].prompt_token_ids == (7, 2)
    assert answer.usage.prompt_tokens == 2


def test_a_conversation_is_classified_as_its_template_renders_it(tokenizer):
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="a")], add_generation_prompt=False)
    backend = NumbersBackend()
    assert call(tokenizer, "Classify", pb.ClassifyRequest(chat=chat), head=SEQUENCE, backend=backend)[0] == "OK"
    [asked] = backend.requests
    assert asked.prompt_token_ids[0] == IM_START
    assert tokenizer.decode(asked.prompt_token_ids, False) == "<|im_start|>user\na<|im_end|>\n"


def test_classify_tokens_gives_a_row_for_each_token(tokenizer):
    _, _, answer = call(tokenizer, "ClassifyTokens", pb.ClassifyTokensRequest(token_ids=ids(7, 8)), head=TOKENS)
    assert list(answer.token_ids) == [7, 8]
    assert list(answer.logits) == [0.0, 1.0, 0.5, 0.0, 0.0, 0.5]
    assert list(answer.label_ids) == [1, 2]


def test_an_answers_span_has_its_text(tokenizer):
    """The bytes "a" and "b" are 64 and 65."""
    _, _, answer = call(tokenizer, "AnswerSpan", pb.AnswerSpanRequest(text="? ab!"), head=ANSWERS)
    assert (answer.start, answer.end, answer.text) == (2, 3, "ab")
    assert list(answer.start_logits) == [0, 0, 1, 0, 0]
    assert list(answer.end_logits) == [0, 0, 0, 1, 0]


def test_an_answers_span_has_no_text_where_there_is_no_tokenizer():
    _, _, answer = call(None, "AnswerSpan", pb.AnswerSpanRequest(token_ids=ids(1, 64, 65, 2)), head=ANSWERS)
    assert (answer.start, answer.end, answer.text) == (1, 2, "")


def test_an_answer_whose_text_finds_no_turn_ends_with_that_error(tokenizer, monkeypatch):
    async def busy(*arguments, **options):
        raise Overloaded("64 texts wait already")

    monkeypatch.setattr(InferenceService, "detokenize", busy)
    code, details, answer = call(tokenizer, "AnswerSpan", pb.AnswerSpanRequest(text="? ab!"), head=ANSWERS)
    assert (code, details, answer) == ("RESOURCE_EXHAUSTED", "64 texts wait already", pb.AnswerSpanResponse())


@pytest.mark.parametrize(
    ("method", "request_", "token_bytes", "head"),
    [
        ("ClassifyTokens", pb.ClassifyTokensRequest, 2 * 3 + 3 * 4, TOKENS),
        ("AnswerSpan", pb.AnswerSpanRequest, 3 + 2 * 4, ANSWERS),
    ],
)
def test_numbers_for_each_token_have_a_limit_too(tokenizer, method, request_, token_bytes, head):
    request, backend = request_(token_ids=ids(*[70] * 50)), NumbersBackend()
    metadata = [(RECEIVE_KEY, str(50 * token_bytes - 1))]
    code, details, _ = call(tokenizer, method, request, head=head, backend=backend, metadata=metadata)
    assert (code, not backend.requests) == ("INVALID_ARGUMENT", True)
    assert f"the answer has {50 * token_bytes} bytes" in details
    metadata = [(RECEIVE_KEY, str(50 * token_bytes + 60))]
    assert call(tokenizer, method, request, head=head, metadata=metadata)[0] == "OK"


@pytest.mark.parametrize(
    ("method", "request_", "head", "answers"),
    [
        ("Generate", pb.GenerateRequest, SEQUENCE, "Classify and Embed, not Generate"),
        ("Score", pb.ScoreRequest, TOKENS, "ClassifyTokens and Embed, not Score"),
        ("Classify", pb.ClassifyRequest, Head(), "Generate, Score and Embed, not Classify"),
        ("AnswerSpan", pb.AnswerSpanRequest, SEQUENCE, "Classify and Embed, not AnswerSpan"),
        ("Classify", pb.ClassifyRequest, Head(kind="none"), "Embed, not Classify"),
    ],
)
def test_a_result_that_the_model_has_no_head_for_is_refused_by_name(tokenizer, method, request_, head, answers):
    backend = NumbersBackend()
    code, details, _ = call(tokenizer, method, request_(text="a"), head=head, backend=backend)
    assert (code, not backend.requests) == ("INVALID_ARGUMENT", True)
    assert details.endswith(f"it answers {answers}")


def test_the_models_info_names_its_head_and_labels(tokenizer):
    _, _, info = call(tokenizer, "GetModelInfo", pb.GetModelInfoRequest(), head=SEQUENCE)
    assert (info.head, list(info.labels)) == (pb.HEAD_SEQUENCE_CLASSIFICATION, ["bad", "good"])
    _, _, info = call(tokenizer, "GetModelInfo", pb.GetModelInfoRequest())
    assert (info.head, list(info.labels)) == (pb.HEAD_CAUSAL_LM, [])


@pytest.mark.parametrize("method", ["Score", "Embed"])
@pytest.mark.parametrize(
    ("fields", "details"),
    [
        ({}, "input is empty"),
        ({"token_ids": ids()}, "token_ids is empty"),
        ({"token_ids": ids(VOCAB_SIZE)}, "the vocabulary ends at 299"),
        ({"text": ""}, "text is empty"),
        ({"text": "a", "timeout_ms": 0}, "timeout_ms is 0"),
        ({"text": "a", "request_id": "a b"}, "request_id is 'a b'"),
    ],
)
def test_odd_input_is_refused_before_anything_runs(tokenizer, method, fields, details):
    backend = NumbersBackend()
    request = {"Score": pb.ScoreRequest, "Embed": pb.EmbedRequest}[method](**fields)
    code, found, _ = call(tokenizer, method, request, backend=backend)
    assert code == "INVALID_ARGUMENT"
    assert details in found
    assert not backend.requests


def test_an_answer_that_the_client_could_not_take_is_refused_before_the_work(tokenizer):
    """3 bytes of an id and 4 of a number, each token."""
    backend, request = NumbersBackend(), pb.ScoreRequest(token_ids=ids(*[1] * 50))
    code, details, _ = call(tokenizer, "Score", request, backend=backend, metadata=[(RECEIVE_KEY, "349")])
    assert code == "INVALID_ARGUMENT"
    assert "the answer has 350 bytes, this client takes 349; send 49 tokens at a time" in details
    assert not backend.requests
    assert call(tokenizer, "Score", request, metadata=[(RECEIVE_KEY, "350")])[0] == "OK"


def test_an_engines_error_is_the_calls(tokenizer):
    failed = SequenceUpdate(request_id="a", finish_reason="error", error=ShardUnavailable("shard 1 is gone", 1))
    code, details, _ = call(tokenizer, "Embed", pb.EmbedRequest(text="a"), backend=NumbersBackend(failed))
    assert (code, details) == ("UNAVAILABLE", "shard 1 is gone")


def test_a_replica_of_an_older_version_that_brings_a_token_is_named(tokenizer):
    token = SequenceUpdate(request_id="a", token_ids=(5,), finish_reason="length")
    code, details, _ = call(tokenizer, "Score", pb.ScoreRequest(text="a"), backend=NumbersBackend(token))
    assert code == "UNAVAILABLE"
    assert "of an older version" in details


def test_a_result_has_a_time_budget(tokenizer):
    async def scenario():
        service = make_service(tokenizer, Silent())
        await service.compute(Prompt(text="a"), "token_logprobs", timeout_s=0.01)

    class Silent:
        async def generate(self, request):
            await asyncio.Event().wait()
            yield

    with pytest.raises(DeadlineExceeded):
        asyncio.run(scenario())


def test_a_result_goes_on_at_another_replica_when_its_own_dies(tokenizer):
    class Replicas:
        def __init__(self):
            self.tries = iter([ReplicaDied(), NumbersBackend()])

        def generate(self, request):
            return next(self.tries).generate(request)

    class ReplicaDied:
        async def generate(self, request):
            from cluster.errors import ReplicaUnavailable

            raise ReplicaUnavailable("gone", 1)
            yield

    backend = ReplayingBackend(Replicas(), max_replays=2, room_timeout_s=1.0, clock=TickingClock())
    code, _, answer = call(tokenizer, "Score", pb.ScoreRequest(token_ids=ids(1, 2)), backend=backend)
    assert (code, list(answer.logprobs)) == ("OK", [-2.0])


def test_a_key_is_asked_for_and_pays_for_the_prompt(tokenizer, tmp_path):
    key, line = new_key("team")
    (tmp_path / "keys").write_text(f"{line} tokens_per_minute=4\n")
    keys = ApiKeys(tmp_path / "keys", TickingClock())
    request, header = pb.ScoreRequest(token_ids=ids(1, 2, 3, 4, 5)), [("authorization", f"Bearer {key}")]
    assert call(tokenizer, "Score", request, keys=keys)[0] == "UNAUTHENTICATED"
    assert call(tokenizer, "Score", request, keys=keys, metadata=header)[0] == "OK"
    assert call(tokenizer, "Embed", pb.EmbedRequest(text="a"), keys=keys, metadata=header)[0] == "RESOURCE_EXHAUSTED"


def test_the_client_sends_and_reads_results(tokenizer):
    """Through a server of its own: the address, the metadata, the messages."""
    service = make_service(tokenizer, NumbersBackend())

    def handler(method, response):
        def answer(request, context):
            return asyncio.run(getattr(GrpcInferenceService(service), method)(request, FakeContext()))

        return grpc.unary_unary_rpc_method_handler(answer, response_serializer=response.SerializeToString)

    server = grpc.server(ThreadPoolExecutor(1))
    handlers = {"Score": handler("Score", pb.ScoreResponse), "Embed": handler("Embed", pb.EmbedResponse)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with Client(f"127.0.0.1:{port}") as client:
        assert list(client.score([4, 5, 6]).logprobs) == [-5.0, -6.0]
        assert list(client.embed("hello", pooling="mean", normalize=False).embedding) == [HELLO, 0.0]
        with pytest.raises(InvalidRequest, match="pooling is 'max', last or mean is needed"):
            client.embed("hello", pooling="max")
        with pytest.raises(Unavailable, match="no server answers"):
            Client("127.0.0.1:1").score("hello")
    server.stop(None)


def test_numbers_travel_as_bytes_and_survive_what_a_slow_reader_meets():
    numbers = Numbers.of(np.arange(6, dtype=np.float32).reshape(2, 3))
    assert numbers.data == struct.pack("<6f", *range(6))
    assert pickle.loads(pickle.dumps(numbers)) == numbers
    assert numbers.array().tolist() == [[0, 1, 2], [3, 4, 5]]
    numbers.array()[0] = 7  # a copy
    last = SequenceUpdate(request_id="a", numbers=numbers, finish_reason="stop")

    async def through():
        updates = UpdateQueue(max_bytes=1)
        assert updates.put(SequenceUpdate(request_id="a"))
        assert updates.put(last)
        return await updates.take()

    assert asyncio.run(through()) == last
