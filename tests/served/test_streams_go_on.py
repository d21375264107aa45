"""A stream that goes on behind any of its tokens (`continue_from`) at the served port, as the whole answer does."""

import json
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.pb.moecluster.v1 import inference_pb2_grpc

pytestmark = [pytest.mark.ray]

AT_ONCE = 8
SCHEMA = {"type": "object", "properties": {"expert": {"enum": [1, 22, 333]}}, "required": ["expert"]}
FORMS = {
    "greedy": {"temperature": 0, "max_tokens": 12, "ignore_eos": True, "logprobs": 2},
    "sampled with penalties": {
        "temperature": 0.9, "top_p": 0.9, "seed": 11, "max_tokens": 12, "ignore_eos": True, "logprobs": 1,
        "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.7,
    },
    "JSON of a schema": {
        "temperature": 0.8, "seed": 5, "max_tokens": 40, "structured_outputs": pb.StructuredOutputs(
            json=json.dumps(SCHEMA)),
    },
    "characters of several tokens": {
        "temperature": 1, "seed": 3, "max_tokens": 40, "structured_outputs": pb.StructuredOutputs(regex="[日本語é]{4}"),
    },
    "a stop string of several tokens": {
        "temperature": 1, "seed": 3, "max_tokens": 40, "stop": ["語!é"], "structured_outputs": pb.StructuredOutputs(
            regex="語!日é語!é日日")},
}  # fmt: skip


class Asker:
    def __init__(self, channel):
        self._stub = inference_pb2_grpc.InferenceServiceStub(channel)

    def __call__(self, params, continue_from=()):
        params = pb.SamplingParams(**params)
        request = pb.GenerateStreamRequest(text="Which experts?", sampling_params=params, continue_from=continue_from)
        return list(self._stub.GenerateStream(request, timeout=60))


def said(pieces):
    """logprobs: of sums in another order, so without their last digits."""
    return (
        "".join(piece.text for piece in pieces),
        [token for piece in pieces for token in piece.token_ids],
        [round(top.logprob, 3) for piece in pieces for entry in piece.logprobs for top in entry.top],
        end_of(pieces[-1]),
    )


def end_of(piece):
    """How many of the prompt's tokens were in the cache is another matter."""
    return piece.finish_reason, piece.usage.prompt_tokens, piece.usage.completion_tokens


@pytest.mark.parametrize("params", FORMS.values(), ids=FORMS)
def test_at_every_token_the_rest_is_that_of_the_whole_answer(channel, params):
    ask = Asker(channel)
    whole = ask(params)
    cuts, received = [], []
    for index, piece in enumerate(whole[:-1], 1):
        received += piece.token_ids
        cuts.append((index, tuple(received)))
    assert len(cuts) > 4
    with ThreadPoolExecutor(AT_ONCE) as pool:
        rests = list(pool.map(lambda cut: ask(params, cut[1]), cuts))
    for (index, received), rest in zip(cuts, rests, strict=True):
        assert rest[0].num_continued == len(received)
        assert said([*whole[:index], *rest]) == said(whole)
    [end] = ask(params, said(whole)[1])  # all came but the end
    assert (list(end.token_ids), end_of(end)) == ([], end_of(whole[-1]))


@pytest.mark.parametrize(
    ("tokens", "params", "words"),
    [
        ([1, 2, 3], {"temperature": 0, "max_tokens": 2}, "continue_from has 3 tokens"),
        ([1, 10**6], {"temperature": 0}, "continue_from has 1000000 at position 1"),
        ([70, 1], FORMS["JSON of a schema"], "continue_from at position 0"),
        ([1], {"temperature": 1}, "continue_from needs the seed"),
    ],
)
def test_what_no_answer_says_is_refused(channel, tokens, params, words):
    with pytest.raises(grpc.RpcError) as refusal:
        Asker(channel)(params, tokens)
    assert refusal.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.value.details().startswith(words)
    assert "\n" not in refusal.value.details()
