"""Whether a request fits an engine's context and cache, and how long its answer may become. Knows no queue."""

from dataclasses import replace

from cluster.errors import InvalidRequest, Unavailable
from cluster.outcome import CALLS
from cluster.types import EngineRequest, SamplingParams


def fitting(request: EngineRequest, max_model_len: int, cache_tokens: int) -> SamplingParams:
    """The request's parameters, with a max_tokens that the client did not ask for lowered to what fits.

    Raises InvalidRequest: a max_tokens that the client asked for is never changed. Raises Unavailable for a kind of
    result that only a newer version knows.
    """
    params = request.params
    num_prompt_tokens = len(request.prompt_token_ids)
    if request.wants not in CALLS:
        raise Unavailable(
            f"request {request.called} wants {request.wants!r}, which its attention replica's older version does not "
            "know: send it again when `moe-cluster roll` is through"
        )
    if request.wants != "tokens":
        _check_prompt(num_prompt_tokens, max_model_len, cache_tokens)
        return params
    room = min(max_model_len, cache_tokens) - num_prompt_tokens
    if request.max_tokens_is_default:
        if cache_tokens - num_prompt_tokens < 1:
            raise InvalidRequest(
                f"the prompt has {num_prompt_tokens} tokens, and with the first token of an answer the KV cache holds "
                f"{cache_tokens}: shorten it, or serve with a larger kv_cache_bytes",
                "input",
            )
        params = replace(params, max_tokens=max(1, min(params.max_tokens or 1, room)))
    total = num_prompt_tokens + (params.max_tokens or 1)
    if total > max_model_len:
        raise InvalidRequest(
            f"prompt ({num_prompt_tokens} tokens) plus max_tokens ({params.max_tokens}) is {total}, the context has "
            f"{max_model_len}",
            "max_tokens",
        )
    if total > cache_tokens:
        raise InvalidRequest(
            f"prompt ({num_prompt_tokens} tokens) plus max_tokens ({params.max_tokens}) is {total}, the KV cache holds "
            f"{cache_tokens}: shorten the request, or serve with a larger kv_cache_bytes",
            "max_tokens",
        )
    return params


def _check_prompt(num_tokens: int, max_model_len: int, cache_tokens: int) -> None:
    """Of a request that wants no new token, so that its prompt may fill all there is."""
    if num_tokens > max_model_len:
        raise InvalidRequest(f"the prompt has {num_tokens} tokens, the context has {max_model_len}", "input")
    if num_tokens > cache_tokens:
        raise InvalidRequest(
            f"the prompt has {num_tokens} tokens, the KV cache has room for {cache_tokens}: shorten it, or serve with "
            "a larger kv_cache_bytes",
            "input",
        )
