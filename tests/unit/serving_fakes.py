"""A tiny tokenizer directory and a backend whose answers are known by hand, for the tests of `cluster.serving`."""

import asyncio
import json
import math
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from cluster.conversation import ChatMessage, Conversation
from cluster.outcome import Head
from cluster.serving.admission.admission import Admission, AdmissionLimits
from cluster.serving.admission.api_keys import ApiKeys
from cluster.serving.service import InferenceService, ServiceLimits
from cluster.serving.text.tokenizer import Tokenizer as ServedTokenizer
from cluster.tracing.requests import RequestTracing
from cluster.types import EngineRequest, Logprobs, ModelInfo, SamplingParams, SequenceUpdate

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Ids 0 to 255 are the bytes in the order of their byte-level characters: "!" (0x21) is 0, so "a" (0x61) is 64.
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o")]
HE, LL, HELL, HELLO = 256, 257, 258, 259
IM_START, IM_END, ADDED = 260, 261, 262  # the first two are special, the third ("日本") is not
NUM_TOKENS = 263
VOCAB_SIZE = 300  # the model's, padded
MAX_MODEL_LEN = 64


def byte_ids(text: str | bytes) -> tuple[int, ...]:
    """The ids of single printable ASCII bytes, and of b" " (which is "Ġ", the 221st character)."""
    raw = text.encode() if isinstance(text, str) else text
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return tuple(alphabet.index(_CHAR_OF_BYTE[byte]) for byte in raw)


# GPT-2's table, written out from its definition: printable bytes stand for themselves, the others count up from 256.
_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_CHAR_OF_BYTE = {b: chr(b) for b in _PRINTABLE} | {
    b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in _PRINTABLE)
}


def write_tokenizer(model_dir: Path, **config: object) -> Path:
    """Writes tokenizer.json and tokenizer_config.json; `config` replaces keys of the latter."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    for left, right in MERGES:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    tokenizer.add_tokens([AddedToken("日本", special=False)])
    model_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(model_dir / "tokenizer.json"))
    full = {"chat_template": CHATML, "eos_token": {"content": "<|im_end|>"}, "bos_token": None} | config
    (model_dir / "tokenizer_config.json").write_text(json.dumps(full))
    return model_dir


def says(content: str, role: str = "user") -> Conversation:
    """A conversation of one turn, ready for the answer."""
    return Conversation(messages=[ChatMessage(role=role, content=content)])


class EchoBackend:
    """Answers each prompt with its own tokens, `step` at a time, then EOS; max_tokens cuts the answer ("length").

    For the prompt [7, 8, 9] and step 2 the updates are (7, 8), then (9, EOS) with "stop"; with max_tokens 2 there is
    one, (7, 8) with "length". A log-probability is -token_id. `script` replaces all updates; `hang` waits for ever
    before the first. `requests` and `closed` record what came in and whose stream was closed before its end.
    """

    def __init__(self, *, step: int = 1, script: Sequence[SequenceUpdate | Exception] = (), hang: bool = False):
        self.step = step
        self.script = script
        self.hang = hang
        self.requests: list[EngineRequest] = []
        self.closed: list[str] = []
        self.reached = asyncio.Event()  # set when a stream is waited for

    async def generate(self, request: EngineRequest) -> AsyncGenerator[SequenceUpdate, None]:
        self.requests.append(request)
        finished = False
        try:
            self.reached.set()
            if self.hang:
                await asyncio.Event().wait()
            for update in self.script or self._echo(request):
                if isinstance(update, Exception):
                    raise update
                finished = update.finish_reason is not None
                yield update
        finally:
            if not finished:
                self.closed.append(request.called)

    def _echo(self, request: EngineRequest) -> list[SequenceUpdate]:
        limit = request.params.max_tokens or 0
        tokens = (*request.prompt_token_ids, IM_END)[:limit]
        reason = "length" if len(request.prompt_token_ids) >= limit else "stop"
        updates = []
        for i in range(0, len(tokens), self.step):
            part = tokens[i : i + self.step]
            wants = request.params.logprobs is not None
            logprobs = tuple(Logprobs(t, -float(t), ((t, -float(t)),)) for t in part) if wants else ()
            last = i + self.step >= len(tokens)
            updates.append(
                SequenceUpdate(
                    request_id=request.request_id,
                    token_ids=part,
                    logprobs=logprobs,
                    finish_reason=reason if last else None,
                    constrained=request.constraint is not None,
                    adapter=request.adapter,
                )
            )
        return updates


class FakeMetrics:
    """Writes every call down as (name, *arguments)."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def started(self) -> None:
        self.calls.append(("started",))

    def finished(self, outcome: str) -> None:
        self.calls.append(("finished", outcome))

    def first_token(self, seconds: float) -> None:
        self.calls.append(("first_token", seconds))

    def inter_token(self, seconds: float, num_tokens: int) -> None:
        self.calls.append(("inter_token", seconds, num_tokens))

    def end_to_end(self, seconds: float) -> None:
        self.calls.append(("end_to_end", seconds))

    def example(self, of: str, seconds: float, trace_id: str) -> None:
        self.calls.append(("example", of, seconds, trace_id))

    def result(self, method: str) -> None:
        self.calls.append(("result", method))

    def prompt_tokens(self, count: int) -> None:
        self.calls.append(("prompt_tokens", count))

    def generated_tokens(self, count: int) -> None:
        self.calls.append(("generated_tokens", count))

    def named(self, name: str) -> list[tuple[object, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]


class TickingClock:
    """Adds `tick` seconds at each reading."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now_s = 100.0
        self.tick = tick

    def __call__(self) -> float:
        self.now_s += self.tick
        return self.now_s


def make_service(
    tokenizer: ServedTokenizer,
    backend: object,
    *,
    defaults: SamplingParams | None = None,
    metrics: FakeMetrics | None = None,
    max_request_bytes: int = 10_000,
    max_model_len: int = MAX_MODEL_LEN,
    clock: TickingClock | None = None,
    room: float = math.inf,
    max_streams_per_client: int = 0,
    max_waiting_inputs: int = 64,
    keys: ApiKeys | None = None,
    admission: Admission | None = None,
    head: Head | None = None,
    adapters: Sequence[str] = (),
    spans: RequestTracing | None = None,
) -> InferenceService:
    """A service whose generated request ids count up: "generated-1", "generated-2"."""
    info = ModelInfo(
        model_id="tiny", vocab_size=VOCAB_SIZE, max_model_len=max_model_len, num_hidden_layers=2,
        num_experts=4, num_experts_per_tok=2, dtype="float32", eos_token_ids=(IM_END,), head=head or Head(),
    )  # fmt: skip
    ids = iter(range(1, 1_000_000))
    return InferenceService(
        tokenizer=tokenizer,
        info=info,
        defaults=defaults or SamplingParams(temperature=0.7, top_k=20),
        adapters=lambda: adapters,
        backend=backend,
        metrics=metrics or FakeMetrics(),
        limits=ServiceLimits(max_request_bytes=max_request_bytes, max_waiting_inputs=max_waiting_inputs),
        admission=admission
        or Admission(keys, AdmissionLimits(max_streams_per_client=max_streams_per_client), room=lambda: room),
        clock=clock or TickingClock(),
        new_request_id=lambda: f"generated-{next(ids)}",
        spans=spans,
    )
