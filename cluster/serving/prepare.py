"""Makes an engine's request of a prompt: tokenizes it, fills defaults in, refuses requests that can never succeed.

Knows no running requests and no network. `service` runs its requests.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from cluster import inputs
from cluster.errors import InvalidRequest
from cluster.inputs import CONTINUED
from cluster.outcome import Wants
from cluster.serving.text.prompts import Prompt
from cluster.serving.text.work import NoTextWork, TextWork
from cluster.types import SAMPLING_DEFAULTS, EngineRequest, ModelInfo, SamplingParams

# An engine of a version that knows results of tokens alone brings as few as it can.
_NO_TOKENS = replace(SAMPLING_DEFAULTS, temperature=0.0, max_tokens=1, seed=0)


class RequestCompleter:
    """Completes tokenized prompts to requests for one model.

    defaults: the checkpoint's generation_config; None fields take `SAMPLING_DEFAULTS`.
    """

    def __init__(self, info: ModelInfo, defaults: SamplingParams) -> None:
        self._info = info
        self._defaults = defaults

    def complete(
        self,
        token_ids: Iterable[int],
        params: SamplingParams,
        *,
        field: str,
        request_id: str,
        timeout_s: float | None = None,
        adapter: str = "",
        continue_from: Sequence[int] = (),
    ) -> EngineRequest:
        """Returns the request as an engine takes it; `field` is the prompt's name in a refusal.

        Raises InvalidRequest with the field, the value and the limit.
        """
        self.check_serves("tokens")
        prompt_token_ids = self.prompt(token_ids, field)
        self.check_in_vocabulary(params.stop_token_ids, "stop_token_ids")
        self.check_in_vocabulary([token_id for token_id, _ in params.biases], "logit_bias")
        resolved = self._resolve(replace(params, structured_outputs=None), field, len(prompt_token_ids))
        return EngineRequest(
            request_id=request_id,
            prompt_token_ids=prompt_token_ids,
            params=resolved,
            output_token_ids=self._continued(continue_from, resolved),
            num_continued=len(continue_from),
            constraint=params.constraint,
            timeout_s=timeout_s,
            max_tokens_is_default=params.max_tokens is None,
            adapter=adapter,
        )

    def result(
        self,
        token_ids: Iterable[int],
        wants: Wants,
        *,
        field: str,
        request_id: str,
        timeout_s: float | None = None,
        num_top: int = 0,
        adapter: str = "",
    ) -> EngineRequest:
        """As `complete`, for a result of numbers. Its prompt may be as long as the context.

        num_top: of the likeliest tokens at each position, beside a prompt's log-probabilities.
        """
        self.check_serves(wants)
        prompt_token_ids = self.prompt(token_ids, field)
        if wants == "label_logits":
            prompt_token_ids = self._info.head.classified(prompt_token_ids)
        return EngineRequest(
            request_id=request_id,
            prompt_token_ids=prompt_token_ids,
            params=replace(_NO_TOKENS, logprobs=num_top) if num_top else _NO_TOKENS,
            timeout_s=timeout_s,
            wants=wants,
            adapter=adapter,
        )

    def check_serves(self, wants: Wants) -> None:
        """Raises InvalidRequest for a result that the model's head does not give."""
        self._info.head.check_serves(wants)

    def prompt(self, token_ids: Iterable[int], field: str) -> tuple[int, ...]:
        """Returns a prompt's ids as plain ints. Raises InvalidRequest for none, too many, and a value that is no id."""
        limit = self._info.max_model_len
        if isinstance(token_ids, list | tuple):
            self._check_length(len(token_ids), field)  # before each of a million is looked at, for 25 ms
        ids = inputs.prompt_token_ids(token_ids, field, limit)
        if not ids:
            raise InvalidRequest(f"{field} is empty, a prompt of at least one token is needed", field)
        self._check_length(len(ids), field)
        self.check_in_vocabulary(ids, field)
        return ids

    def _check_length(self, num_tokens: int, field: str) -> None:
        if num_tokens > (limit := self._info.max_model_len):
            raise InvalidRequest(f"{field} has {num_tokens} tokens, the context has {limit}", field)

    def check_in_vocabulary(self, token_ids: Sequence[int], field: str) -> None:
        """Raises InvalidRequest for the first id that the model does not have."""
        limit = self._info.vocab_size
        if not token_ids or (min(token_ids) >= 0 and max(token_ids) < limit):
            return
        position = next(i for i, token_id in enumerate(token_ids) if not 0 <= token_id < limit)
        raise InvalidRequest(
            f"{field} has {inputs.shown(token_ids[position])} at position {position}, "
            f"the vocabulary ends at {limit - 1}",
            field,
        )

    def _continued(self, token_ids: Sequence[int], params: SamplingParams) -> tuple[int, ...]:
        """Returns an answer's tokens so far as plain ints. params: with every default filled in. Raises
        InvalidRequest."""
        if not token_ids:
            return ()
        most = params.max_tokens or 1
        if len(token_ids) > most:  # before each is looked at
            raise InvalidRequest(
                f"{CONTINUED} has {len(token_ids)} tokens, an answer to this prompt has {most} at most: max_tokens, or "
                "the rest of the context",
                CONTINUED,
            )
        if params.seed is None and not params.greedy:
            raise InvalidRequest(
                f"{CONTINUED} needs the seed with which the answer began: give one from the start, or temperature 0",
                CONTINUED,
            )
        ids = inputs.prompt_token_ids(token_ids, CONTINUED, most)
        self.check_in_vocabulary(ids, CONTINUED)
        return ids

    def _resolve(self, params: SamplingParams, field: str, num_prompt_tokens: int) -> SamplingParams:
        """Fills every default in. Raises InvalidRequest for a request that does not fit the context."""
        limit = self._info.max_model_len
        room = limit - num_prompt_tokens
        if room < 1:
            raise InvalidRequest(
                f"{field} has {num_prompt_tokens} tokens, at most {limit - 1} leave room for an answer in "
                f"the context of {limit}",
                field,
            )
        max_tokens = params.max_tokens
        if max_tokens is None:
            max_tokens = min(self._defaults.max_tokens or room, room)
        if max_tokens > room:
            raise InvalidRequest(
                f"max_tokens is {max_tokens}: with the prompt's {num_prompt_tokens} tokens that is "
                f"{num_prompt_tokens + max_tokens}, over the context of {limit}; at most {room} fit",
                "max_tokens",
            )
        resolved = replace(params, max_tokens=max_tokens)  # checks min_tokens against it
        return resolved.with_defaults(self._defaults).with_defaults(SAMPLING_DEFAULTS)


class RequestPreparer:
    """Prepares requests for one model. Never blocks for long: `TextWork` does the long work beside the event loop."""

    def __init__(self, work: TextWork | NoTextWork, info: ModelInfo, defaults: SamplingParams) -> None:
        self._work = work
        self._completer = RequestCompleter(info, defaults)

    async def prepare(
        self, prompt: Prompt, params: SamplingParams, *, request_id: str, timeout_s: float | None, client: str = ""
    ) -> EngineRequest:
        """Returns the request as an engine takes it. Raises InvalidRequest: field, value and limit; Overloaded."""
        if params.stop:
            self._work.check_stop()
        if params.constraint is not None:
            await self._work.check_constraint(params.constraint, client)
        token_ids = await self._token_ids(prompt, client)
        return self._completer.complete(
            token_ids, params, field=prompt.field, request_id=request_id, timeout_s=timeout_s, adapter=prompt.adapter,
            continue_from=prompt.continue_from,
        )  # fmt: skip

    async def result(
        self, prompt: Prompt, wants: Wants, *, request_id: str, client: str = "", num_top: int = 0
    ) -> EngineRequest:
        """As `prepare`, for a result of numbers."""
        token_ids = await self._token_ids(prompt, client)
        return self._completer.result(
            token_ids, wants, field=prompt.field, request_id=request_id, num_top=num_top, adapter=prompt.adapter
        )

    async def _token_ids(self, prompt: Prompt, client: str) -> Iterable[int]:
        return await self.tokenize(prompt, client) if prompt.token_ids is None else prompt.token_ids

    async def tokenize(self, prompt: Prompt, client: str = "") -> list[int]:
        """Returns the token ids of a text or a conversation. Raises InvalidRequest, Overloaded."""
        if prompt.text is not None:
            return await self._work.encode(prompt.text, client)
        if prompt.chat is not None:
            return await self._work.encode_chat(prompt.chat, client)
        raise InvalidRequest("token_ids are tokens already, text or chat is needed", "token_ids")

    async def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool, client: str = "") -> str:
        """Returns the text of token ids. Raises InvalidRequest for one outside the vocabulary; Overloaded."""
        self._completer.check_in_vocabulary(token_ids, "token_ids")
        return await self._work.decode(token_ids, skip_special_tokens, client)
