"""HTTP calls whose answers are numbers or tokens, on a backend whose numbers are known."""

import asyncio
import base64

import numpy as np
import pytest
from http_tools import MODEL, Front
from serving_fakes import HELLO, IM_END, IM_START, byte_ids, write_tokenizer
from test_results_served import SEQUENCE, TOKENS, NumbersBackend

from cluster.errors import ShardUnavailable
from cluster.outcome import Head, Numbers
from cluster.serving.openai import answer_size
from cluster.serving.openai.several import AT_A_TIME
from cluster.serving.text.tokenizer import Tokenizer
from cluster.types import SequenceUpdate


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum()


def post(tokenizer, path, body, head=None, backend=None):
    front = Front(tokenizer, backend or NumbersBackend(), head=head or Head())
    response = asyncio.run(front.post(path, body))
    return response.status_code, response.json()


def test_embeddings_have_openais_shape_and_a_length_of_one(tokenizer):
    status, answer = post(tokenizer, "/v1/embeddings", {"model": MODEL, "input": [[1, 5], [1, 0]], "user": "u"})
    assert status == 200
    assert [each["object"] for each in answer["data"]] == ["embedding"] * 2
    assert [each["index"] for each in answer["data"]] == [0, 1]
    np.testing.assert_allclose(answer["data"][0]["embedding"], np.array([3, 4, 5]) / np.sqrt(50), rtol=1e-6)
    np.testing.assert_allclose(answer["data"][1]["embedding"], [0.6, 0.8, 0], rtol=1e-6)
    assert (answer["object"], answer["model"], answer["created"]) == ("list", MODEL, 1234)
    assert answer["usage"] == {"prompt_tokens": 4, "total_tokens": 4, "completion_tokens": 0}


@pytest.mark.parametrize(
    ("given", "num"), [("hello", 1), (["hello", "hello"], 2), ([1, 2, 3], 1), ([[1], [2], [3]], 3)]
)
def test_an_input_is_a_text_token_ids_or_several(tokenizer, given, num):
    _, answer = post(tokenizer, "/v1/embeddings", {"input": given})
    assert len(answer["data"]) == num


def test_base64_has_the_float32_bytes(tokenizer):
    body = {"input": [1, 5], "encoding_format": "base64", "normalize": False}
    _, answer = post(tokenizer, "/v1/embeddings", body)
    raw = base64.b64decode(answer["data"][0]["embedding"])
    assert np.frombuffer(raw, "<f4").tolist() == [3.0, 4.0, 5.0]


def test_the_mean_of_all_tokens_is_ours(tokenizer):
    _, answer = post(tokenizer, "/v1/embeddings", {"input": [1, 5], "pooling": "mean", "normalize": False})
    assert answer["data"][0]["embedding"] == [3.0, 0.0]


def test_classify_gives_the_label_and_its_probabilities(tokenizer):
    _, answer = post(tokenizer, "/classify", {"input": [[1, 2], [0, 0]]}, SEQUENCE)
    first, second = answer["data"]
    assert (first["label"], first["num_classes"], second["label"]) == ("good", 2, "bad")
    np.testing.assert_allclose(first["probs"], [1 / (1 + np.e**2), 1 / (1 + np.e**-2)], rtol=1e-6)
    assert second["probs"] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("head", "task", "expected"),
    [
        (Head(), None, [0.6, 0.8, 0.0]),
        (SEQUENCE, None, [0.5, 0.5]),
        (SEQUENCE, "embed", [0.6, 0.8, 0.0]),
        (TOKENS, None, [softmax([0, 1, 0.5]), softmax([0, 0, 0.5])]),
    ],
)  # fmt: skip
def test_pooling_takes_the_heads_task(tokenizer, head, task, expected):
    body = {"input": [1, 0]} | ({"task": task} if task else {})
    status, answer = post(tokenizer, "/pooling", body, head)
    assert (status, answer["data"][0]["object"]) == (200, "pooling")
    # The classified prompt loses its padding, [1] is left: logits [0, 1].
    if head is SEQUENCE and task is None:
        expected = [1 / (1 + np.e), 1 / (1 + 1 / np.e)]
    np.testing.assert_allclose(answer["data"][0]["data"], expected, rtol=1e-6)


def test_a_score_is_the_cosine_of_two_embeddings(tokenizer):
    body = {"text_1": "!", "text_2": ["!", "a"]}  # "!" is token 0, "a" is 64
    _, answer = post(tokenizer, "/score", body)
    a, b = np.array([3, 4, 0]), np.array([3, 4, 64])
    expected = [1.0, a @ b / np.linalg.norm(a) / np.linalg.norm(b)]
    np.testing.assert_allclose([each["score"] for each in answer["data"]], expected, rtol=1e-6)


@pytest.mark.parametrize(("path", "names"), [("/v1/score", ("queries", "documents")), ("/score", ("data_1", "data_2"))])
def test_vllms_other_names_of_a_scores_texts(tokenizer, path, names):
    _, expected = post(tokenizer, "/score", {"text_1": "!", "text_2": ["!", "a"]})
    _, answer = post(tokenizer, path, dict(zip(names, ("!", ["!", "a"]), strict=True)))
    assert answer["data"] == expected["data"]


def test_documents_come_with_the_best_first(tokenizer):
    """By the scores above: "!" is like itself, "a" less so."""
    a, b = np.array([3, 4, 0]), np.array([3, 4, 64])
    _, answer = post(tokenizer, "/v1/rerank", {"query": "!", "documents": ["a", "!"]})
    assert [(one["index"], one["document"]["text"]) for one in answer["results"]] == [(1, "!"), (0, "a")]
    expected = [1.0, a @ b / np.linalg.norm(a) / np.linalg.norm(b)]
    np.testing.assert_allclose([one["relevance_score"] for one in answer["results"]], expected, rtol=1e-6)
    few = {"query": "!", "documents": ["a", "!"], "top_n": 1, "return_documents": False}
    [best] = post(tokenizer, "/rerank", few)[1]["results"]
    assert (best["index"], best["document"]) == (1, None)


@pytest.mark.parametrize("field", ["use_activation", "normalize"])
def test_numbers_come_as_the_model_gives_them(tokenizer, field):
    """Of "!", token 0: [3, 4, 0] by the fake engine, and its logits."""
    body = {"input": "!", field: False}
    np.testing.assert_allclose(post(tokenizer, "/v1/embeddings", body)[1]["data"][0]["embedding"], [3, 4, 0])
    np.testing.assert_allclose(post(tokenizer, "/pooling", body)[1]["data"][0]["data"], [3, 4, 0])
    logits = post(tokenizer, "/pooling", body, SEQUENCE)[1]["data"][0]["data"]
    assert post(tokenizer, "/classify", body, SEQUENCE)[1]["data"][0]["probs"] == logits
    assert sum(logits) != pytest.approx(1)


def test_a_head_with_one_label_scores_both_texts_together(tokenizer):
    one = Numbers.of(np.array([1.0]))
    backend = NumbersBackend(SequenceUpdate(request_id="a", numbers=one, finish_reason="stop"))
    head = Head(kind="sequence_classification", labels=("LABEL_0",), activation="none")
    _, answer = post(tokenizer, "/score", {"text_1": "a", "text_2": "b"}, head, backend)
    [asked] = backend.requests
    assert asked.prompt_token_ids == byte_ids("ab")
    np.testing.assert_allclose(answer["data"][0]["score"], 1 / (1 + np.exp(-1)), rtol=1e-6)


@pytest.mark.parametrize(
    ("path", "body", "word"),
    [
        ("/v1/embeddings", {"input": []}, "0 prompts"),
        ("/v1/embeddings", {"input": [[]]}, "empty"),
        ("/v1/embeddings", {"input": [1] * 65}, "the context has 64"),
        ("/v1/embeddings", {"input": [300]}, "vocabulary"),
        ("/v1/embeddings", {"input": [-1]}, "vocabulary"),
        ("/v1/embeddings", {"input": [True]}, "input"),
        ("/v1/embeddings", {"input": ["a", 1]}, "input"),
        ("/v1/embeddings", {"input": ["a"] * 2049}, "2049 prompts"),
        ("/v1/embeddings", {"input": "a", "dimensions": 2}, "dimensions"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ("/classify", {"input": "a"}, "head for next tokens"),
        ("/pooling", {"input": "a", "task": "token_classify"}, "head for next tokens"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["c"]}, "text_1 has 2"),
        ("/score", {"text_1": [], "text_2": []}, "text_1 has 0"),
        ("/score", {"text_1": "a"}, "queries and documents"),
        ("/score", {"text_1": "a", "text_2": "a", "queries": "a"}, "queries and documents"),
        ("/score", {}, "queries and documents"),
        ("/rerank", {"query": "a", "documents": []}, "documents has 0"),
        ("/rerank", {"query": "a", "documents": ["a"], "top_n": -1}, "top_n"),
        ("/tokenize", {}, "prompt and messages are both missing"),
        ("/tokenize", {"prompt": "a", "messages": []}, "both"),
        ("/tokenize", {"messages": []}, "messages has 0"),
        ("/detokenize", {"tokens": [300]}, "vocabulary"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
    ],
)  # fmt: skip
def test_bad_bodies_are_refused(tokenizer, path, body, word):
    backend = NumbersBackend()
    status, answer = post(tokenizer, path, body, backend=backend)
    assert status == 400
    assert word in answer["error"]["message"]
    assert backend.requests == []


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/embeddings", {"input": ""}, "input"),
        ("/pooling", {"input": [300]}, "input"),
        ("/detokenize", {"tokens": [300]}, "tokens"),
        ("/score", {"text_1": "a", "text_2": ""}, None),
        ("/v1/rerank", {"query": "a", "documents": [""]}, None),
        ("/v1/completions", {"prompt": [300]}, "prompt"),
    ],
)
def test_a_bad_prompt_is_refused_by_the_name_that_the_call_has_for_it(tokenizer, path, body, param):
    status, answer = post(tokenizer, path, body)
    assert (status, answer["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/rerank", {"query": "a", "documents": []}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": ["b"] * 2049}, "documents"),
        ("/score", {"queries": "a", "documents": []}, "documents"),
        ("/score", {"queries": ["a", "b"], "documents": ["c"] * 3}, "queries"),
        ("/score", {"data_1": [], "data_2": "a"}, "data_1"),
        ("/score", {"text_1": "a"}, "text_2"),
        ("/score", {"documents": ["a"]}, "queries"),
        ("/score", {}, "text_1"),
    ],
)
def test_texts_that_do_not_go_together_are_refused_by_their_own_name(tokenizer, path, body, param):
    status, answer = post(tokenizer, path, body)
    assert (status, answer["error"]["param"]) == (400, param)
    assert param in answer["error"]["message"]


def test_the_first_failure_ends_a_call_of_many(tokenizer):
    backend = NumbersBackend(ShardUnavailable("a shard is gone"))
    status, answer = post(tokenizer, "/v1/embeddings", {"input": [[1]] * 100}, backend=backend)
    assert (status, answer["error"]["message"]) == (503, "a shard is gone")
    assert len(backend.requests) == len(backend.closed) <= 2 * AT_A_TIME


def test_tokenize_and_detokenize_are_each_others_inverse(tokenizer):
    _, answer = post(tokenizer, "/tokenize", {"prompt": "hello", "return_token_strs": True})
    assert answer == {"count": 1, "max_model_len": 64, "tokens": [HELLO], "token_strs": ["hello"]}
    chat = {"messages": [{"role": "user", "content": "hello"}], "add_generation_prompt": False}
    _, answer = post(tokenizer, "/tokenize", chat)
    assert answer["tokens"] == [IM_START, *byte_ids(b"user\n"), HELLO, IM_END, *byte_ids(b"\n")]
    _, text = post(tokenizer, "/detokenize", {"tokens": answer["tokens"]})
    assert text == {"prompt": "<|im_start|>user\nhello<|im_end|>\n"}


def test_vectors_of_too_many_tokens_are_refused(tokenizer, monkeypatch):
    """Two prompts of two tokens with a number for each label, in base64 a quarter of the bytes."""
    num_numbers = 4 * len(TOKENS.labels)
    monkeypatch.setattr(answer_size, "MAX_ANSWER_BYTES", num_numbers * answer_size.NUMBER_BYTES - 1)
    body = {"input": [[1, 5], [1, 0]], "task": "token_classify"}
    status, refused = post(tokenizer, "/pooling", body, TOKENS)
    assert (status, refused["error"]["param"]) == (400, "input")
    assert "encoding_format base64" in refused["error"]["message"]
    status, answer = post(tokenizer, "/pooling", body | {"encoding_format": "base64"}, TOKENS)
    assert (status, len(answer["data"])) == (200, 2)
