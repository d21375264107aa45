"""Refuses unary answers that their caller could not take: a gRPC client receives 4 MiB unless its limit is raised.

A larger one would end at the client, with RESOURCE_EXHAUSTED and after all the work. A client with a higher limit says
so in the call's metadata.
"""

from collections.abc import Mapping

from cluster.errors import InvalidRequest
from cluster.types import SamplingParams
from cluster.wire import DEFAULT_RECEIVE_BYTES, MAX_ANSWER_BYTES, RECEIVE_KEY

# Of moecluster.v1's messages, with ids of three bytes.
_TOKEN_BYTES = 3 + 4  # its id, and a usual token's text
_LOGPROBS_BYTES = 16  # of one position: the chosen token, its number, the lengths
_TOP_BYTES = 15  # of one of the likeliest tokens


def receive_limit(metadata: Mapping[str, str]) -> int:
    """Returns the bytes of an answer that reach the caller. Raises InvalidRequest."""
    text = metadata.get(RECEIVE_KEY, str(DEFAULT_RECEIVE_BYTES))
    if not text.isascii() or not text.isdigit():
        raise InvalidRequest(f"{RECEIVE_KEY} is {text!r}, a number of bytes is needed", RECEIVE_KEY)
    return min(int(text[:12]), MAX_ANSWER_BYTES)


def check_before(params: SamplingParams, limit: int) -> None:
    """Raises InvalidRequest where max_tokens would be too much. params: with every default filled in."""
    if params.logprobs is None or params.max_tokens is None:
        return
    each = _TOKEN_BYTES + _LOGPROBS_BYTES + _TOP_BYTES * params.logprobs
    if params.max_tokens * each > limit:
        raise InvalidRequest(
            f"max_tokens is {params.max_tokens}: with logprobs {params.logprobs} the answer may have "
            f"{params.max_tokens * each} bytes, this client takes {limit}; ask for a stream, for {limit // each} "
            f"tokens, or raise the client's limit (grpc.max_receive_message_length) and say so in the metadata "
            f"{RECEIVE_KEY}",
            "max_tokens",
        )


def check_numbers(num_tokens: int, bytes_each: int, limit: int) -> None:
    """Raises InvalidRequest where an answer with numbers for each token of the prompt would be too much."""
    if num_tokens * bytes_each > limit:
        raise InvalidRequest(
            f"the prompt has {num_tokens} tokens: the answer has {num_tokens * bytes_each} bytes, this client takes "
            f"{limit}; send {limit // bytes_each} tokens at a time, or raise the client's limit "
            f"(grpc.max_receive_message_length) and say so in the metadata {RECEIVE_KEY}",
            "input",
        )


def check_after(num_bytes: int, limit: int) -> None:
    """Raises InvalidRequest for an answer that is too long; nobody could know it before."""
    if num_bytes > limit:
        raise InvalidRequest(
            f"the answer has {num_bytes} bytes, this client takes {limit}: ask for less, or raise the client's limit "
            f"(grpc.max_receive_message_length) and say so in the metadata {RECEIVE_KEY}",
            "request",
        )
