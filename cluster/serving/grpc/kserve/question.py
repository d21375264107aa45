"""A ModelInferRequest as a question: the tensors and parameters of Triton's vLLM backend. Knows no network.

Source: docs of github.com/triton-inference-server/vllm_backend. Its samples send numbers as texts ("0.1"), which are
read here, too.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from cluster import inputs
from cluster.errors import InvalidRequest
from cluster.pb.inference import grpc_service_pb2 as pb
from cluster.serving.choices import MAX_CHOICES
from cluster.serving.grpc.kserve.tensors import read_elements
from cluster.serving.text.prompts import Prompt
from cluster.types import SamplingParams

INPUTS = {
    "text_input": "BYTES",
    "stream": "BOOL",
    "sampling_parameters": "BYTES",
    "exclude_input_in_output": "BOOL",
    "return_finish_reason": "BOOL",
    "return_cumulative_logprob": "BOOL",
    "return_logprobs": "BOOL",
    "return_num_input_tokens": "BOOL",
    "return_num_output_tokens": "BOOL",
}
OUTPUTS = {
    "text_output": "BYTES",
    "finish_reason": "BYTES",
    "cumulative_logprob": "FP32",
    "logprobs": "BYTES",
    "num_input_tokens": "UINT32",
    "num_output_tokens": "UINT32",
}
TIMEOUT = "timeout"  # of Triton's client, in microseconds
EMPTY_FINAL = "triton_enable_empty_final_response"  # of Triton's client; the last response is never empty here
_TEXTS = ("stop", "structured_outputs", "stop_token_ids", "logit_bias")
_NAMES = {field.name for field in fields(SamplingParams)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """outputs: the names of the tensors that answers have, in OUTPUTS' order.  text: of the prompt, which the output
    begins with where `prepends`.  num: of outputs.  raw: whether tensors are raw bytes.
    """

    text: str
    adapter: str
    params: SamplingParams
    num: int
    stream: bool
    prepends: bool
    outputs: tuple[str, ...]
    timeout_s: float | None
    raw: bool

    @property
    def prompt(self) -> Prompt:
        return Prompt(text=self.text, adapter=self.adapter)


def to_question(request: pb.ModelInferRequest, adapter: str) -> Question:
    """adapter: of the request's model. Raises InvalidRequest."""
    given = read_elements(request, INPUTS)
    if "text_input" not in given:
        raise InvalidRequest("text_input is missing: it is the prompt", "text_input")
    stream = given.get("stream", False) is True
    prepends = given.get("exclude_input_in_output", stream) is False
    if stream and prepends:
        raise InvalidRequest("exclude_input_in_output is false, which an answer in pieces has no place for", "stream")
    parameters = {name: _value(parameter) for name, parameter in request.parameters.items()}
    timeout_s = _timeout_s(parameters.pop(TIMEOUT, None))
    parameters.pop(EMPTY_FINAL, None)
    if (sampling := given.get("sampling_parameters")) is not None:
        if parameters:
            raise InvalidRequest(
                f"parameter {inputs.shown(min(parameters))} stands beside sampling_parameters: put it in there",
                "parameters",
            )
        parameters = _object(_text(sampling, "sampling_parameters"))
    num, adapter = _num(parameters.pop("n", None)), _lora(parameters.pop("lora_name", None)) or adapter
    outputs = _outputs(request, given)
    return Question(
        text=_text(given["text_input"], "text_input"),
        adapter=adapter,
        params=_params(parameters, with_logprobs=not {"logprobs", "cumulative_logprob"}.isdisjoint(outputs)),
        num=num,
        stream=stream,
        prepends=prepends,
        outputs=outputs,
        timeout_s=timeout_s,
        raw=bool(request.raw_input_contents),
    )


def _outputs(request: pb.ModelInferRequest, given: Mapping[str, bytes | bool]) -> tuple[str, ...]:
    """text_output, those that an input asks for, and those that `outputs` names; of these alone, if it names any."""
    asked = [name for name in OUTPUTS if name == "text_output" or given.get(f"return_{name}") is True]
    if not request.outputs:
        return tuple(asked)
    named = {output.name for output in request.outputs}
    if unknown := named - set(OUTPUTS):
        raise InvalidRequest(f"output {inputs.shown(min(unknown))} is unknown; known: {', '.join(OUTPUTS)}", "outputs")
    for output in request.outputs:
        if output.parameters:
            raise InvalidRequest(f"output {output.name} has parameters: tensors come in the response", "outputs")
    return tuple(name for name in OUTPUTS if name in named)


def _params(given: dict[str, Any], *, with_logprobs: bool) -> SamplingParams:
    params = SamplingParams.from_mapping({name: _plain(name, value) for name, value in given.items()})
    return replace(params, logprobs=0) if with_logprobs and params.logprobs is None else params


def _plain(name: str, value: Any) -> Any:
    """A number or a truth value that is written as a text."""
    if not isinstance(value, str) or name not in _NAMES or name == "stop":
        return value
    try:
        return json.loads(value if name in _TEXTS else value.lower())
    except (ValueError, RecursionError):
        return value  # which is then refused by name


def _value(parameter: pb.InferParameter) -> Any:
    kind = parameter.WhichOneof("parameter_choice")
    return None if kind is None else getattr(parameter, kind)


def _timeout_s(given: Any) -> float | None:
    if given is None:
        return None
    microseconds = inputs.whole_number(given, TIMEOUT)
    if microseconds < 1:
        raise InvalidRequest(f"timeout is {microseconds}, microseconds of at least 1 are needed", TIMEOUT)
    return microseconds / 1e6


def _num(given: Any) -> int:
    if given is None:
        return 1
    num = inputs.whole_number(
        int(given) if isinstance(given, str) and given.isascii() and given.isdecimal() else given, "n"
    )
    if not 1 <= num <= MAX_CHOICES:
        raise InvalidRequest(f"n is {num}, 1 to {MAX_CHOICES} are allowed", "n")
    return num


def _lora(given: Any) -> str:
    return "" if given is None else inputs.text(given, "lora_name")


def _text(data: bytes | bool, name: str) -> str:
    assert isinstance(data, bytes)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{name} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}", name) from None


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"sampling_parameters is no JSON ({error}): {inputs.shown(text)}", "sampling_parameters"
        ) from None
    if not isinstance(value, dict):
        raise InvalidRequest(
            f"sampling_parameters is {inputs.shown(value)}, an object is needed", "sampling_parameters"
        )
    return value
