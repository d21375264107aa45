"""A plain gRPC client of the service, for the command line. Knows no Ray."""

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar, cast

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster import inputs
from cluster.client.direct import grpc_options
from cluster.client.files import read_whole
from cluster.client.going_on import PATIENCE_S, Patience, going_on, seeded
from cluster.client.grpc_errors import error_of
from cluster.conversation import ChatMessage, Conversation
from cluster.errors import InvalidRequest, SetupError, Unavailable
from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.pb.moecluster.v1 import inference_pb2_grpc
from cluster.serving.grpc.chats import to_chat_messages
from cluster.serving.grpc.forms import form_message
from cluster.structured import StructuredOutputsParams
from cluster.types import SamplingParams
from cluster.wire import MAX_ANSWER_BYTES, RECEIVE_KEY

MAX_PROMPT_TOKENS = 1 << 24  # of a prompt that is an iterator; the server knows the context

OnePrompt = str | Conversation | Sequence[ChatMessage] | Iterable[int]
Asking = TypeVar(
    "Asking", pb.GenerateStreamRequest, pb.ScoreRequest, pb.EmbedRequest, pb.ClassifyRequest, pb.ClassifyTokensRequest,
    pb.AnswerSpanRequest,
)  # fmt: skip
# Without these a channel tries again after 1 s, then later and later, up to 2 minutes.
RECONNECTING = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 2000))
_POOLINGS = {"last": pb.POOLING_LAST, "mean": pb.POOLING_MEAN}


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """PEM files. ca: of the authority that signed the server's certificate; None: those that this machine trusts.
    cert, key: this client's own, for a server that asks for them; both or neither."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises SetupError."""
        if (self.cert is None) != (self.key is None):
            raise SetupError("a client's certificate and its key belong together: give both --tls-cert and --tls-key")
        ca, key, cert = (None if path is None else read_whole(path) for path in (self.ca, self.key, self.cert))
        for path, content in ((self.ca, ca), (self.key, key), (self.cert, cert)):
            if content is not None and b"-----BEGIN " not in content:
                raise SetupError(f"{path} is no PEM file: text with a line -----BEGIN … is needed")
        return grpc.ssl_channel_credentials(ca, key, cert)


class Client:
    """One connection. Blocking; use it as a context manager. address: "host:port".  tls: None is plain text.
    adapter: the name of the LoRA adapter that computes its prompts, "" for the model alone.
    patience_s: for how long an answer whose connection broke waits for its next token; None: not at all."""

    def __init__(
        self,
        address: str,
        *,
        api_key: str = "",
        tls: TlsFiles | None = None,
        adapter: str = "",
        patience_s: float | None = PATIENCE_S,
    ) -> None:
        """Raises SetupError."""
        if not api_key.isascii() or not api_key.isprintable():
            raise SetupError("the API key has characters that no key has: ASCII without spaces is needed")
        self.address, self._adapter = address, adapter
        self._patience = None if patience_s is None else Patience(patience_s)
        self._has_key = bool(api_key)
        key = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        self._metadata = (*key, (RECEIVE_KEY, str(MAX_ANSWER_BYTES)))
        # Answers with many log-probabilities are larger than what gRPC takes by itself.
        options = [*grpc_options(address), ("grpc.max_receive_message_length", -1), *RECONNECTING]
        self._channel = (
            grpc.insecure_channel(address, options)
            if tls is None
            else grpc.secure_channel(address, tls.credentials(), options)
        )
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)

    def stream(
        self,
        prompt: OnePrompt,
        params: SamplingParams,
        *,
        request_id: str = "",
    ) -> Generator[pb.GenerateStreamResponse, None, None]:
        """Yields the pieces of an answer to a text, a conversation or token ids; closing the iterator cancels it.

        An answer whose connection breaks goes on over another one (`going_on`): a pause, then the next piece. Without a
        seed it gets one here. With a `patience_s` of None it does neither.
        Raises ClusterError with the server's message.
        """
        request = _request(prompt, params if self._patience is None else seeded(params), request_id)
        request.adapter = self._adapter
        if self._patience is None:
            yield from self._stream(request)
            return

        def ask(received: tuple[int, ...]) -> Generator[pb.GenerateStreamResponse, None, None]:
            request.continue_from[:] = received
            return self._stream(request)

        yield from going_on(ask, self._patience)

    def _stream(self, request: pb.GenerateStreamRequest) -> Generator[pb.GenerateStreamResponse, None, None]:
        """One connection's part of an answer. Raises ClusterError."""
        call, num_before = self._stub.GenerateStream(request, metadata=self._metadata), len(request.continue_from)
        try:
            for piece in call:
                if piece.num_continued != num_before:
                    raise Unavailable(
                        f"{self.address} is of an older version, which goes on with no answer: ask again when "
                        "`moe-cluster roll` is through"
                    )
                num_before = 0  # the first message alone has it
                yield piece
        except grpc.RpcError as error:
            raise error_of(error, self.address, has_key=self._has_key) from error
        finally:
            call.cancel()

    def score(self, prompt: OnePrompt, *, request_id: str = "") -> pb.ScoreResponse:
        """The log-probability of each token of a prompt after the first. Raises ClusterError with the server's
        message, as the others do."""
        request = _filled_in(pb.ScoreRequest(request_id=request_id, adapter=self._adapter), prompt)
        return cast(pb.ScoreResponse, self._ask(self._stub.Score, request))

    def embed(
        self, prompt: OnePrompt, *, pooling: str = "last", normalize: bool = True, request_id: str = ""
    ) -> pb.EmbedResponse:
        """A prompt's vector. pooling: "last" or "mean"."""
        if pooling not in _POOLINGS:
            raise InvalidRequest(f"pooling is {inputs.shown(pooling)}, {' or '.join(_POOLINGS)} is needed", "pooling")
        request = pb.EmbedRequest(
            request_id=request_id, pooling=_POOLINGS[pooling], normalize=normalize, adapter=self._adapter
        )
        return cast(pb.EmbedResponse, self._ask(self._stub.Embed, _filled_in(request, prompt)))

    def classify(self, prompt: OnePrompt, *, request_id: str = "") -> pb.ClassifyResponse:
        """A prompt's labels."""
        request = _filled_in(pb.ClassifyRequest(request_id=request_id, adapter=self._adapter), prompt)
        return cast(pb.ClassifyResponse, self._ask(self._stub.Classify, request))

    def classify_tokens(self, prompt: str | Iterable[int], *, request_id: str = "") -> pb.ClassifyTokensResponse:
        """The labels of a prompt's tokens."""
        request = _filled_in(pb.ClassifyTokensRequest(request_id=request_id, adapter=self._adapter), prompt)
        return cast(pb.ClassifyTokensResponse, self._ask(self._stub.ClassifyTokens, request))

    def answer_span(self, prompt: str | Iterable[int], *, request_id: str = "") -> pb.AnswerSpanResponse:
        """Where the answer stands in a prompt of a question and its context."""
        request = _filled_in(pb.AnswerSpanRequest(request_id=request_id, adapter=self._adapter), prompt)
        return cast(pb.AnswerSpanResponse, self._ask(self._stub.AnswerSpan, request))

    def tokenize(self, text: str) -> list[int]:
        """The token ids that a text has for the model. Raises ClusterError with the server's message."""
        try:
            request = pb.TokenizeRequest(text=text)
        except ValueError as error:
            raise InvalidRequest(f"the request cannot be sent: {error}", "text") from error
        return list(cast(pb.TokenizeResponse, self._ask(self._stub.Tokenize, request)).token_ids)

    def model_info(self) -> pb.GetModelInfoResponse:
        """Raises ClusterError with the server's message."""
        return cast(pb.GetModelInfoResponse, self._ask(self._stub.GetModelInfo, pb.GetModelInfoRequest()))

    def is_serving(self, timeout_s: float) -> bool:
        """Returns whether the server says that it serves; false when it cannot be reached."""
        try:
            reply = health_pb2_grpc.HealthStub(self._channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError:
            return False
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, call: Callable[..., Message], request: Message) -> Message:
        """One message for one message. Raises ClusterError with the server's message."""
        try:
            answer = call(request, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error, self.address, has_key=self._has_key) from error
        if self._patience is not None:
            self._patience.heard()
        return answer


def _request(prompt: OnePrompt, params: SamplingParams, request_id: str) -> pb.GenerateStreamRequest:
    """Raises InvalidRequest for values that no message carries."""
    try:
        request = pb.GenerateStreamRequest(request_id=request_id, sampling_params=sampling_message(params))
    except (AttributeError, TypeError, ValueError) as error:
        raise InvalidRequest(f"the request cannot be sent: {error}", "input") from error
    return _filled_in(request, prompt)


def _filled_in(request: Asking, prompt: OnePrompt) -> Asking:
    """The message with its input. Raises InvalidRequest for values that no message carries."""
    try:
        chat = _as_chat(prompt)
        if isinstance(prompt, str):
            request.text = prompt
        elif chat is None or isinstance(request, pb.ClassifyTokensRequest | pb.AnswerSpanRequest):
            request.token_ids.ids.extend(inputs.prompt_token_ids(prompt, "token_ids", MAX_PROMPT_TOKENS))
        else:
            request.chat.CopyFrom(to_chat_messages(chat))
    except (AttributeError, TypeError, ValueError) as error:
        raise InvalidRequest(f"the request cannot be sent: {error}", "input") from error
    return request


def _as_chat(prompt: OnePrompt) -> Conversation | None:
    if isinstance(prompt, Conversation):
        return prompt
    is_turns = isinstance(prompt, Sequence) and bool(prompt) and isinstance(prompt[0], ChatMessage)
    return Conversation(messages=cast(Sequence[ChatMessage], prompt)) if is_turns else None


def sampling_message(params: SamplingParams) -> pb.SamplingParams:
    """Leaves out what is None: the server fills the checkpoint's default in."""
    fields = pb.SamplingParams.DESCRIPTOR.fields
    optional = (field.name for field in fields if field.has_presence and field.message_type is None)
    form = params.structured_outputs
    given = {name: value for name in optional if (value := getattr(params, name)) is not None}
    return pb.SamplingParams(
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        logit_bias=dict(params.logit_bias),
        structured_outputs=None if form is None else form_message(StructuredOutputsParams.of(form)),
        **given,
    )
