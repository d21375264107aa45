"""Makes text of one sequence's tokens, piece by piece, and finds the reason of its end."""

from collections.abc import Sequence

from cluster.errors import ClusterError, RequestCancelled
from cluster.serving.text.detokenizer import StreamDetokenizer, TokenBytes
from cluster.types import FinishReason, Logprobs, SamplingParams, SequenceUpdate, TextDelta


class Answer:
    """Turns one sequence's updates into deltas of text, and finds its end. name: of the request, for errors."""

    def __init__(
        self, tokenizer: TokenBytes, params: SamplingParams, eos_token_ids: Sequence[int], name: str = ""
    ) -> None:
        self._name = name
        self._detokenizer = StreamDetokenizer(tokenizer, stop=tuple(params.stop), min_tokens=params.min_tokens)
        self._end_ids = frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else eos_token_ids)

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
