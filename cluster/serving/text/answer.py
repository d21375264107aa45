"""Makes text of one sequence's tokens, piece by piece, and finds the reason of its end."""

import asyncio
from collections.abc import Sequence

from cluster.errors import ClusterError, InvalidRequest, RequestCancelled
from cluster.inputs import CONTINUED
from cluster.serving.text.detokenizer import StreamDetokenizer, TokenBytes
from cluster.types import FinishReason, Logprobs, SamplingParams, SequenceUpdate, TextDelta

MANY_TOKENS = 1024  # 2 ms of work; more of it is done in a thread


class Answer:
    """Turns one sequence's updates into deltas of text, and finds its end. name: of the request, for errors."""

    def __init__(
        self, tokenizer: TokenBytes, params: SamplingParams, eos_token_ids: Sequence[int], name: str = ""
    ) -> None:
        self._name = name
        self._detokenizer = StreamDetokenizer(tokenizer, stop=tuple(params.stop), min_tokens=params.min_tokens)
        self._end_ids = frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else eos_token_ids)
        self._min_tokens = params.min_tokens

    @property
    def matched_stop(self) -> str | None:
        """Returns the stop string that ended the text, None so far."""
        return self._detokenizer.stopped

    async def go_on(self, token_ids: Sequence[int]) -> str:
        """Takes the tokens in that the client has already, before any update; returns their text as far as it has it.
        Raises InvalidRequest for tokens behind the answer's end."""
        many = len(token_ids) > MANY_TOKENS
        return await asyncio.to_thread(self._take_in, token_ids) if many else self._take_in(token_ids)

    def _take_in(self, token_ids: Sequence[int]) -> str:
        num_text = next((i for i, token in enumerate(token_ids) if self._ends(token, i + 1)), len(token_ids))
        text = self._detokenizer.push(token_ids[:num_text])
        num_kept = self._detokenizer.num_tokens if self._detokenizer.stopped is not None else num_text + 1
        if num_kept < len(token_ids):
            raise InvalidRequest(
                f"{CONTINUED} has {len(token_ids)} tokens, the answer ended after {num_kept} of them", CONTINUED
            )
        return text

    def _ends(self, token_id: int, num_tokens: int) -> bool:
        """Whether an answer of so many tokens has ended with this one; as the engine's sequence decides."""
        return token_id in self._end_ids and num_tokens > self._min_tokens

    def add(self, update: SequenceUpdate) -> TextDelta:
        """Returns what an update adds; finish_reason is set at the end. Raises the update's error."""
        if update.error is not None:
            raise update.error
        name = self._name or update.request_id
        if update.finish_reason == "cancelled":
            raise RequestCancelled(f"request {name} was cancelled by the server")
        if update.finish_reason == "error":
            raise ClusterError(f"request {name}: the engine reported an error without saying which")
        text_ids, end_ids = self._split(update)
        num_before = self._detokenizer.num_tokens
        text = self._detokenizer.push(text_ids)
        finish_reason: FinishReason | None = update.finish_reason
        if finish_reason is not None:
            text += self._detokenizer.flush()
        num_kept = self._detokenizer.num_tokens - num_before
        if self._detokenizer.stopped is not None:
            finish_reason = "stop"
        else:
            num_kept += len(end_ids)
        logprobs: tuple[Logprobs, ...] = update.logprobs[:num_kept]
        return TextDelta(
            text=text,
            token_ids=update.token_ids[:num_kept],
            logprobs=logprobs,
            finish_reason=finish_reason,
            matched_stop=self._detokenizer.stopped,
        )

    def _split(self, update: SequenceUpdate) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Splits off the token that ended the sequence (EOS or a stop token), which is no text."""
        token_ids = update.token_ids
        if update.finish_reason == "stop" and token_ids and token_ids[-1] in self._end_ids:
            return token_ids[:-1], token_ids[-1:]
        return token_ids, ()
