"""Forms of answers in protobuf messages. Knows no grammar."""

from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.structured import StructuredOutputsParams


def to_form(message: pb.StructuredOutputs) -> StructuredOutputsParams:
    """Raises InvalidRequest."""
    match message.WhichOneof("form"):
        case "json":
            return StructuredOutputsParams(json=message.json)
        case "json_object":
            return StructuredOutputsParams(json_object=message.json_object)
        case "regex":
            return StructuredOutputsParams(regex=message.regex)
        case "choice":
            return StructuredOutputsParams(choice=tuple(message.choice.texts))
        case "grammar":
            return StructuredOutputsParams(grammar=message.grammar)
    return StructuredOutputsParams()


def message_form(message: pb.SamplingParams) -> StructuredOutputsParams | None:
    """The form that sampling parameters ask for, None for any. Raises InvalidRequest."""
    return to_form(message.structured_outputs) if message.HasField("structured_outputs") else None


def form_message(form: StructuredOutputsParams) -> pb.StructuredOutputs:
    """For a client."""
    if form.choice is not None:
        return pb.StructuredOutputs(choice=pb.Choices(texts=form.choice))
    schema = None if form.json is None else str(form.json)
    return pb.StructuredOutputs(json=schema, json_object=form.json_object, regex=form.regex, grammar=form.grammar)
