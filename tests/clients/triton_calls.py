"""Calls a served cluster with Triton's client. Arguments: address, model, prompt, text of its next twelve tokens."""

import json
import queue
import sys

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput

ADDRESS, MODEL, PROMPT, EXPECTED = sys.argv[1:]
GREEDY = {"temperature": "0", "repetition_penalty": "1", "max_tokens": "12", "ignore_eos": "true"}


def tensor(name, value):
    boolean = isinstance(value, bool)
    one = InferInput(name, [1], "BOOL" if boolean else "BYTES")
    one.set_data_from_numpy(np.array([value if boolean else value.encode()], dtype=bool if boolean else np.object_))
    return one


def asked(**given):
    given = {"text_input": PROMPT, "sampling_parameters": json.dumps(GREEDY), **given}
    return [tensor(name, value) for name, value in given.items()]


def text(result):
    return result.as_numpy("text_output")[0].decode()


with InferenceServerClient(ADDRESS) as client:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(MODEL)
    assert not client.is_model_ready("another")
    assert client.get_server_metadata().name == "moe-cluster"
    assert {t.name for t in client.get_model_metadata(MODEL).outputs} >= {"text_output", "finish_reason"}

    assert text(client.infer(MODEL, asked())) == PROMPT + EXPECTED
    further = asked(
        exclude_input_in_output=True, return_finish_reason=True, return_num_output_tokens=True, return_logprobs=True
    )
    whole = client.infer(MODEL, further, request_id="whole")
    assert text(whole) == EXPECTED
    assert whole.as_numpy("finish_reason")[0] == b"length"
    assert whole.as_numpy("num_output_tokens")[0] == 12
    assert len(json.loads(whole.as_numpy("logprobs")[0])) == 12

    results = queue.Queue()
    client.start_stream(lambda result, error: results.put((result, error)))
    for name in ("a", "b"):
        client.async_stream_infer(MODEL, asked(stream=True), request_id=name, enable_empty_final_response=True)
    client.async_stream_infer("another", asked(stream=True), request_id="c")
    pieces, errors = {"a": "", "b": ""}, []
    left = 3
    while left:
        result, error = results.get(timeout=60)
        if error is not None:
            errors.append(str(error))
            left -= 1
            continue
        response = result.get_response()
        pieces[response.id] += text(result)
        left -= response.parameters["triton_final_response"].bool_param
    client.stop_stream()
    assert pieces == {"a": EXPECTED, "b": EXPECTED}, pieces
    [error] = errors
    assert "another" in error, error
