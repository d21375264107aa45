"""Results of numbers as protobuf messages. Knows no network."""

import numpy as np

from cluster.outcome import Computed, Head
from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.serving.outcomes import best_span, probabilities, unit_vector


def to_score_response(computed: Computed, message: pb.ScoreRequest, head: Head) -> pb.ScoreResponse:
    return pb.ScoreResponse(
        request_id=computed.request_id,
        usage=_usage(computed),
        token_ids=computed.prompt_token_ids,
        logprobs=computed.numbers.array(),
    )


def to_embed_response(computed: Computed, message: pb.EmbedRequest, head: Head) -> pb.EmbedResponse:
    vector = computed.numbers.array()
    normalize = message.normalize if message.HasField("normalize") else True
    return pb.EmbedResponse(
        request_id=computed.request_id,
        usage=_usage(computed),
        embedding=unit_vector(vector) if normalize else vector,
    )


def to_classify_response(computed: Computed, message: pb.ClassifyRequest, head: Head) -> pb.ClassifyResponse:
    logits = computed.numbers.array()
    return pb.ClassifyResponse(
        request_id=computed.request_id,
        usage=_usage(computed),
        logits=logits,
        probs=probabilities(logits, head.activation),
        label=head.labels[int(logits.argmax())],
    )


def to_classify_tokens_response(
    computed: Computed, message: pb.ClassifyTokensRequest, head: Head
) -> pb.ClassifyTokensResponse:
    logits = computed.numbers.array()  # [T, L]
    return pb.ClassifyTokensResponse(
        request_id=computed.request_id,
        usage=_usage(computed),
        token_ids=computed.prompt_token_ids,
        logits=logits.ravel(),
        label_ids=logits.argmax(axis=1),
    )


def to_answer_span_response(computed: Computed, message: pb.AnswerSpanRequest, head: Head) -> pb.AnswerSpanResponse:
    """Without its text."""
    starts, ends = np.ascontiguousarray(computed.numbers.array().T)
    start, end = best_span(starts, ends)
    return pb.AnswerSpanResponse(
        request_id=computed.request_id,
        usage=_usage(computed),
        token_ids=computed.prompt_token_ids,
        start_logits=starts,
        end_logits=ends,
        start=start,
        end=end,
    )


def _usage(computed: Computed) -> pb.Usage:
    return pb.Usage(prompt_tokens=len(computed.prompt_token_ids))
