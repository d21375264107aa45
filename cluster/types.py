"""The values that parts hand to one another. Knows no tensors of the model, no network, no Ray.

All are frozen and can be pickled, so that they travel between actors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self, cast

from cluster import inputs
from cluster.conversation import ChatMessage as ChatMessage  # users import it from here
from cluster.conversation import ToolCall
from cluster.errors import InvalidRequest
from cluster.evolving import evolving
from cluster.outcome import Head, Numbers, Wants
from cluster.sampling_limits import LIMITS, logit_bias, stop_strings, stop_token_ids
from cluster.sampling_limits import MAX_STOP_STRING_CHARS as MAX_STOP_STRING_CHARS
from cluster.sampling_limits import MAX_TOP_LOGPROBS as MAX_TOP_LOGPROBS
from cluster.structured import Constraint, StructuredOutputsParams

FinishReason = Literal["stop", "length", "cancelled", "error"]

GREEDY_BELOW = 1e-5  # a temperature that divides logits into infinities; vLLM's bound (_SAMPLING_EPS)


@evolving("cluster.types")
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens. A field that is None takes the checkpoint's `generation_config.json`, else vLLM's default.

    temperature: greedy below 1e-5.  top_k: 0 keeps all.  top_p, min_p: probabilities after temperature.
    repetition_penalty: over prompt and output (HF's rule).  presence_penalty, frequency_penalty: over output only
    (OpenAI's rule).  seed: the same seed gives the same tokens whatever else is in the batch.
    max_tokens: None is the checkpoint's `max_new_tokens`, else the rest of the context.
    stop: strings that end the output and are cut from its text.  stop_token_ids: end it beside the model's EOS ids.
    logprobs: None for none, n for the chosen token's log-probability and the n likeliest tokens' (all, where the
    vocabulary has fewer), under the model's own distribution (before temperature and penalties).
    logit_bias: -100 to 100 by token id, added to the logits before all else; kept as pairs, in the ids' order.
    structured_outputs: the form that the answer must have, or a mapping of its fields. Log-probabilities are then those
    among the tokens that it allows, and the answer ends where nothing may follow.

    NumPy's numbers and lists of any kind will do, and None for the default. Raises InvalidRequest, with the field's
    name, for every value of another type or out of range.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: Sequence[str] | str = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] = ()
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        plain: dict[str, Any] = {limits.name: limits.checked(getattr(self, limits.name)) for limits in LIMITS}
        plain["min_tokens"] = plain["min_tokens"] or 0
        plain["ignore_eos"] = inputs.truth_value(False if self.ignore_eos is None else self.ignore_eos, "ignore_eos")
        plain["stop"] = stop_strings(self.stop)
        plain["stop_token_ids"] = stop_token_ids(self.stop_token_ids)
        plain["logit_bias"] = logit_bias(self.logit_bias)
        if self.structured_outputs is not None:
            plain["structured_outputs"] = StructuredOutputsParams.of(self.structured_outputs)
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens is {self.min_tokens}, more than max_tokens ({self.max_tokens})", "min_tokens"
            )

    @classmethod
    def from_mapping(cls, given: Mapping[Any, Any]) -> Self:
        """Reads the fields' names and values. Raises InvalidRequest for an unknown name."""
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                raise InvalidRequest(
                    f"sampling parameter {inputs.shown(name)} is unknown; known: {', '.join(known)}", "params"
                )
        return cls(**given)

    @property
    def greedy(self) -> bool:
        return self.temperature is not None and self.temperature < GREEDY_BELOW

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """Returns `logit_bias` as it is kept: pairs of a token id and a number."""
        return cast(tuple[tuple[int, float], ...], self.logit_bias)

    @property
    def constraint(self) -> Constraint | None:
        """The form of the answer, as an engine takes it."""
        form = self.structured_outputs
        return None if form is None else StructuredOutputsParams.of(form).constraint

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty or 1.0) != 1.0 or bool(self.presence_penalty or self.frequency_penalty)

    def with_defaults(self, defaults: "SamplingParams") -> "SamplingParams":
        """Returns a copy in which every field that is None has the value of `defaults`."""
        missing = {
            f.name: value
            for f in fields(self)
            if getattr(self, f.name) is None and (value := getattr(defaults, f.name)) is not None
        }
        return replace(self, **missing) if missing else self


SAMPLING_DEFAULTS = SamplingParams(
    temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0,
)  # fmt: skip


@evolving("cluster.types")
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """A request as an engine takes it: validated, tokenized, every sampling default filled in.

    request_id: unique in the cluster, so that it is found by it.  name: the client's, in logs; two may have the same.
    prompt_token_ids: at least one.  timeout_s: the rest of the client's time budget, None for no bound.
    output_token_ids: generated by an earlier attempt; the first update brings the next one.
    num_continued: of these, the first ones, which are the client's word.
    client: its name; waiting requests of different clients take turns.
    num_replays: earlier attempts; a request that was admitted once is not refused for a full queue.
    num_alone_tokens: new tokens to compute in steps without others, since an engine died at an earlier attempt.
    max_tokens_is_default: the client asked for none, so the engine may lower it to what its cache holds.
    wants: the kind of its result. An engine of a version that knows no other than tokens brings one token.
    constraint: the form of the answer; `params` has none, since an older version could not read it.
    prompt_group: those of one have one prompt, for one replica; "" for none.  ingress: the sender, "" to hear no news.
    adapter: the LoRA adapter's name, "" for the base.  trace: the `traceparent` above its spans, "" where it has none.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    timeout_s: float | None = None
    client: str = ""
    output_token_ids: tuple[int, ...] = ()
    num_replays: int = 0
    num_alone_tokens: int = 0
    name: str = ""
    max_tokens_is_default: bool = False
    wants: Wants = "tokens"
    constraint: Constraint | None = None
    prompt_group: str = ""
    adapter: str = ""
    trace: str = ""
    num_continued: int = 0
    ingress: str = ""

    @property
    def called(self) -> str:
        """Returns its name in logs and errors."""
        return self.name or self.request_id


@evolving("cluster.types")
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """An engine at a moment: sequences, cache blocks, tokens generated since its start.

    block_size: in tokens.  max_model_len: the longest prompt and output.  cache_tokens: the longest sequence that the
    cache holds alone. Each is 0 from a version that does not send it.
    used_blocks: of num_blocks, by the share that is used of the group of layers with the least left.
    at: seconds, wall clock.  held: running sequences that wait for an expert without a living copy.
    drafted_tokens, accepted_tokens: drafted ahead and tried since its start, and those of them that were right.
    kv_cache_dtype: as of `EngineConfig`.
    """

    running: int
    waiting: int
    used_blocks: int
    num_blocks: int
    generated_tokens: int
    at: float
    held: int = 0
    block_size: int = 0
    max_model_len: int = 0
    cache_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    kv_cache_dtype: str = "auto"


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities at one output position: the chosen token's, and the likeliest tokens', best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@evolving("cluster.types")
@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceUpdate:
    """The news of one sequence since the engine last reported.

    logprobs: as long as token_ids when asked for, else empty.  error: set iff finish_reason is "error".
    replica: the one that runs it, in the first update of an attention replica alone, with `prefixes` (`PrefixNews`).
    numbers: the result of a request that wants no tokens, in its last update.
    constrained: the tokens keep to the request's constraint.  adapter: the one that has computed it.
    cached_tokens: of its first tokens, those that were in the cache as it began. An older version tells none of these.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Logprobs, ...] = ()
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    replica: str = ""
    prefixes: tuple[bytes, ...] = ()
    numbers: Numbers | None = None
    constrained: bool = False
    adapter: str = ""
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0  # of the prompt's, those whose keys and values were in the cache


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDelta:
    """One piece of a streamed answer. `usage`, `finish_reason` and `matched_stop` stand in the last one only.

    matched_stop: the stop string that ended it, if one did.  prompt_tokens, cached_tokens: of `Usage`, in each piece.
    text_before: in the first one of an answer that goes on, the text that its client has.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Logprobs, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    matched_stop: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    text_before: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """A finished answer. `text` ends before a stop string or EOS; `token_ids` has every token generated.

    tool_calls: of a chat with tools; `text` has them too.  content: `text` without them, None for all of it.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprobs: tuple[Logprobs, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    content: str | None = None
    cached_tokens: int = 0

    @property
    def message(self) -> ChatMessage:
        """Returns it as an assistant's turn, for the next question's messages."""
        content = self.text if self.content is None else self.content
        return ChatMessage(role="assistant", content=content, tool_calls=self.tool_calls)

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.prompt_token_ids), completion_tokens=len(self.token_ids),
            cached_tokens=self.cached_tokens,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """The answer to GetModelInfo."""

    model_id: str
    vocab_size: int
    max_model_len: int
    num_hidden_layers: int
    num_experts: int
    num_experts_per_tok: int
    dtype: str
    eos_token_ids: tuple[int, ...] = ()
    head: Head = field(default_factory=Head)
