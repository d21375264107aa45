"""Calls of tools in protobuf messages: the choice of a request, the calls of an answer whole and in pieces."""

from collections.abc import Sequence

from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.serving.grpc.chats import to_conversation
from cluster.serving.tools.choice import Mode, ToolChoice
from cluster.serving.tools.reader import CallPiece, CallReader
from cluster.structured import StructuredOutputsParams
from cluster.types import FinishReason

_MODES: dict[pb.ToolMode, Mode] = {pb.TOOL_MODE_NONE: "none", pb.TOOL_MODE_REQUIRED: "required"}
GenerateMessage = pb.GenerateRequest | pb.GenerateStreamRequest


def chosen_form(message: GenerateMessage, given: StructuredOutputsParams | None) -> StructuredOutputsParams | None:
    """The form of the answer: of the calls that the request's tool_choice asks for, else the given one.

    Raises InvalidRequest.
    """
    choice = _choice(message)
    if choice is None or choice.mode != "required":
        return given
    return choice.form(to_conversation(message.chat).tools or (), given)


class AnswerCalls:
    """Takes the calls out of one answer's text, where its request has tools and a tool_choice; else all is text."""

    def __init__(self, message: GenerateMessage) -> None:
        choice = _choice(message)
        reads = choice is not None and choice.mode != "none" and bool(message.chat.tools)
        self._reader = CallReader(choice) if reads and choice is not None else None

    def read(self, text: str, reason: FinishReason | None) -> tuple[str, list[pb.ToolCallPiece]]:
        """Takes a piece of the answer. reason: with the last one. Returns what is certain now: content, and pieces of
        calls."""
        if self._reader is None:
            return text, []
        pieces = self._reader.read(text)
        if reason is not None:
            pieces += self._reader.end()
        return _content(pieces), [_piece(piece) for piece in pieces if isinstance(piece, CallPiece)]

    def calls(self) -> list[pb.ToolCall]:
        """The whole calls, after the last piece."""
        calls = self._reader.calls if self._reader is not None else ()
        return [pb.ToolCall(id=call.id, name=call.name, arguments=call.arguments) for call in calls]

    def end_there(self, reason: FinishReason | None) -> bool:
        """Whether the calls are the reason of the end."""
        return self._reader is not None and reason is not None and self._reader.ended_by_calls(reason)


def _choice(message: GenerateMessage) -> ToolChoice | None:
    if message.WhichOneof("input") != "chat" or not message.chat.HasField("tool_choice"):
        return None
    given = message.chat.tool_choice
    if given.WhichOneof("choice") == "function":
        return ToolChoice(mode="required", name=given.function, several=not given.single)
    return ToolChoice(mode=_MODES.get(given.mode, "auto"), several=not given.single)


def _content(pieces: Sequence[str | CallPiece]) -> str:
    return "".join(piece for piece in pieces if isinstance(piece, str))


def _piece(piece: CallPiece) -> pb.ToolCallPiece:
    return pb.ToolCallPiece(index=piece.index, id=piece.id, name=piece.name, arguments=piece.arguments)
