"""Answers as the output tensors of Triton's vLLM backend. Knows no network."""

import json
from collections.abc import Sequence
from typing import Any

from cluster.pb.inference import grpc_service_pb2 as pb
from cluster.serving.choices import Choice
from cluster.serving.grpc.kserve.question import OUTPUTS, Question
from cluster.serving.grpc.kserve.tensors import add_output
from cluster.types import Logprobs

VERSION = "1"
FINAL = "triton_final_response"


def to_response(
    request: pb.ModelInferRequest, question: Question, pieces: Sequence[Choice], sums: Sequence[float]
) -> pb.ModelInferResponse:
    """pieces: new of each output.  sums: of each output's log-probabilities so far."""
    response = pb.ModelInferResponse(model_name=request.model_name, model_version=VERSION, id=request.id)
    for name in question.outputs:
        if name == "num_input_tokens" and not any(piece.usage.prompt_tokens for piece in pieces):
            continue  # known at the end of an output
        add_output(response, name, OUTPUTS[name], _elements(name, question, pieces, sums), question.raw)
    return response


def _elements(name: str, question: Question, pieces: Sequence[Choice], sums: Sequence[float]) -> Sequence[Any]:
    match name:
        case "text_output":
            before = question.text if question.prepends else ""
            return [(before + piece.text).encode() for piece in pieces]
        case "finish_reason":
            return [str(piece.finish_reason).encode() for piece in pieces]  # "None" until the end, as in Triton
        case "cumulative_logprob":
            return sums
        case "logprobs":
            return [json.dumps([_entry(entry) for entry in piece.logprobs]).encode() for piece in pieces]
        case "num_input_tokens":
            return [max(piece.usage.prompt_tokens for piece in pieces)]
    return [len(piece.token_ids) for piece in pieces]


def _entry(entry: Logprobs) -> dict[str, dict[str, float | int | None]]:
    """By token id. A chosen token that is none of the likeliest has no known rank."""
    found: dict[str, dict[str, float | int | None]] = {}
    for rank, (token_id, logprob) in enumerate(entry.top, start=1):
        found[str(token_id)] = {"logprob": logprob, "rank": rank}
    found.setdefault(str(entry.token_id), {"logprob": entry.logprob, "rank": None})
    return found
