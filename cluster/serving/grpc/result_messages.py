"""Results of numbers as protobuf messages. Knows no network."""

from cluster.outcome import Computed
from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.serving.outcomes import unit_vector


def to_score_response(computed: Computed) -> pb.ScoreResponse:
    return pb.ScoreResponse(
        request_id=computed.request_id,
        token_ids=computed.prompt_token_ids,
        logprobs=computed.numbers.array(),
        usage=_usage(computed),
    )


def to_embed_response(computed: Computed, *, normalize: bool) -> pb.EmbedResponse:
    vector = computed.numbers.array()
    return pb.EmbedResponse(
        request_id=computed.request_id,
        embedding=unit_vector(vector) if normalize else vector,
        usage=_usage(computed),
    )


def _usage(computed: Computed) -> pb.Usage:
    return pb.Usage(prompt_tokens=len(computed.prompt_token_ids))
