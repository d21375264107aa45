"""Answers as the output tensors of Triton's vLLM backend. Knows no network."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from cluster.pb.inference import grpc_service_pb2 as pb
from cluster.serving.choices import Choice
from cluster.serving.grpc.kserve.question import OUTPUTS, Question
from cluster.serving.grpc.kserve.tensors import add_output
from cluster.types import Logprobs

TextOf = Callable[[int], bytes]  # of a token

VERSION = "1"
FINAL = "triton_final_response"


def to_response(
    request: pb.ModelInferRequest, question: Question, pieces: Sequence[Choice], sums: Sequence[float], text_of: TextOf
) -> pb.ModelInferResponse:
    """pieces: new of each output.  sums: of each output's log-probabilities so far."""
    response = pb.ModelInferResponse(model_name=request.model_name, model_version=VERSION, id=request.id)
    for name in question.outputs:
        add_output(response, name, OUTPUTS[name], _elements(name, question, pieces, sums, text_of), question.raw)
    return response


def _elements(
    name: str, question: Question, pieces: Sequence[Choice], sums: Sequence[float], text_of: TextOf
) -> Sequence[Any]:
    match name:
        case "text_output":
            before = question.text if question.prepends else ""
            return [(before + piece.text).encode() for piece in pieces]
        case "finish_reason":
            return [str(piece.finish_reason).encode() for piece in pieces]  # "None" until the end, as in Triton
        case "cumulative_logprob":
            return sums
        case "logprobs":
            return [json.dumps([_entry(entry, text_of) for entry in piece.logprobs]).encode() for piece in pieces]
        case "num_input_tokens":
            return [max(piece.prompt_tokens for piece in pieces)]
    return [len(piece.token_ids) for piece in pieces]


def _entry(entry: Logprobs, text_of: TextOf) -> dict[str, dict[str, float | int | str | None]]:
    """By token id. A chosen token that is none of the likeliest has no known rank."""
    ranked = {token_id: (logprob, rank) for rank, (token_id, logprob) in enumerate(entry.top, start=1)}
    return {
        str(token_id): {"logprob": logprob, "rank": rank, "decoded_token": text_of(token_id).decode(errors="replace")}
        for token_id, (logprob, rank) in {entry.token_id: (entry.logprob, None), **ranked}.items()
    }
