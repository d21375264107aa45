"""Tensors of the Open Inference Protocol: elements to and from their bytes. Knows no meaning of theirs.

Source: the protocol's `InferTensorContents`, and Triton's binary form of BYTES: each element after its length.
"""

import struct
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from cluster import inputs
from cluster.errors import InvalidRequest
from cluster.pb.inference import grpc_service_pb2 as pb

Element = bytes | bool
Tensor = pb.ModelInferRequest.InferInputTensor
_LENGTH = struct.Struct("<I")
_NUMBERS = {"UINT32": ("<u4", "uint_contents"), "FP32": ("<f4", "fp32_contents")}


def read_elements(request: pb.ModelInferRequest, datatypes: Mapping[str, str]) -> dict[str, Element]:
    """The one element of each input tensor, by the tensor's name.

    datatypes: of the tensors that there may be. Raises InvalidRequest.
    """
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidRequest(
            f"raw_input_contents has {len(raw)} entries, one for each of {len(request.inputs)} inputs is needed",
            "inputs",
        )
    found: dict[str, Element] = {}
    for index, tensor in enumerate(request.inputs):
        name = tensor.name
        if name not in datatypes:
            raise InvalidRequest(f"input {inputs.shown(name)} is unknown; known: {', '.join(datatypes)}", "inputs")
        if name in found:
            raise InvalidRequest(f"input {name} is there twice", name)
        _check(tensor, datatypes[name])
        found[name] = _of_raw(tensor, raw[index]) if raw else _of_contents(tensor)
    return found


def _check(tensor: Tensor, datatype: str) -> None:
    if tensor.datatype != datatype:
        raise InvalidRequest(f"{tensor.name} is of {inputs.shown(tensor.datatype)}, {datatype} is needed", tensor.name)
    if any(size != 1 for size in tensor.shape):
        shape = list(tensor.shape)[:8]
        raise InvalidRequest(f"{tensor.name} has the shape {shape}, [1] is needed: one prompt a request", tensor.name)
    if tensor.parameters:
        raise InvalidRequest(
            f"{tensor.name} has the parameter {inputs.shown(min(tensor.parameters))}: a tensor comes in the request",
            tensor.name,
        )


def _of_raw(tensor: Tensor, data: bytes) -> Element:
    if tensor.datatype == "BOOL":
        if len(data) == 1:
            return data != b"\0"
    elif len(data) >= _LENGTH.size and _LENGTH.unpack_from(data)[0] == len(data) - _LENGTH.size:
        return data[_LENGTH.size :]
    raise InvalidRequest(f"{tensor.name} has {len(data)} raw bytes, which are no single {tensor.datatype}", tensor.name)


def _of_contents(tensor: Tensor) -> Element:
    contents = tensor.contents
    elements: Sequence[Element] = contents.bool_contents if tensor.datatype == "BOOL" else contents.bytes_contents
    if len(elements) != 1:
        raise InvalidRequest(f"{tensor.name} has {len(elements)} elements in its contents, 1 is needed", tensor.name)
    return elements[0]


def add_output(response: pb.ModelInferResponse, name: str, datatype: str, elements: Sequence[Any], raw: bool) -> None:
    """Adds an output tensor of one axis. elements: bytes of BYTES, else numbers."""
    tensor = response.outputs.add(name=name, datatype=datatype, shape=[len(elements)])
    assert len(elements) == prod(tensor.shape)
    if datatype == "BYTES":
        if raw:
            response.raw_output_contents.append(b"".join(_LENGTH.pack(len(one)) + one for one in elements))
        else:
            tensor.contents.bytes_contents.extend(elements)
        return
    form, field = _NUMBERS[datatype]
    if raw:
        response.raw_output_contents.append(np.array(elements, dtype=form).tobytes())
    else:
        getattr(tensor.contents, field).extend(elements)
