"""`vllm.grpc.engine.VllmEngine` over a service whose answers are known by hand: an answer is its own prompt."""

import hashlib
import io
import json
import zipfile

import grpc
import numpy as np
import pytest
from gateway_tools import serve
from serving_fakes import HE, HELLO, IM_END, EchoBackend, write_tokenizer

from cluster.outcome import Head, Numbers
from cluster.pb.smg.grpc.common import common_pb2
from cluster.pb.vllm.grpc.engine import vllm_engine_pb2 as pb
from cluster.serving.admission.api_keys import ApiKeys, new_key
from cluster.serving.grpc.gateways import PublishedConfig
from cluster.serving.text.tokenizer import Tokenizer
from cluster.types import EngineStats, SamplingParams, SequenceUpdate
from cluster.wire import RECEIVE_KEY


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def ids(*token_ids):
    return pb.TokenizedInput(input_ids=token_ids)


async def _all(call):
    return [response async for response in call]


def generate(tokenizer, request, backend=None, **service):
    return serve(lambda served: _all(served.vllm.Generate(request)), tokenizer, backend, **service)


def test_a_whole_answer_is_one_complete(tokenizer):
    [response] = generate(tokenizer, pb.GenerateRequest(tokenized=ids(7, 8)))
    complete = response.complete
    assert (list(complete.output_ids), complete.finish_reason) == ([7, 8, IM_END], "stop")
    assert (complete.prompt_tokens, complete.completion_tokens) == (2, 3)
    assert complete.WhichOneof("matched_stop") is None


@pytest.mark.parametrize("stream", [False, True])
def test_all_pieces_say_what_was_cached(tokenizer, stream):
    script = [
        SequenceUpdate(request_id="a", token_ids=(7,), cached_tokens=1),
        SequenceUpdate(request_id="a", token_ids=(8,), finish_reason="length", cached_tokens=1),
    ]
    request = pb.GenerateRequest(tokenized=ids(7, 8), stream=stream)
    pieces = generate(tokenizer, request, EchoBackend(script=script))
    assert [p.chunk.cached_tokens for p in pieces if p.HasField("chunk")] == [1, 1] * stream
    assert pieces[-1].complete.cached_tokens == 1


class ScoringBackend(EchoBackend):
    """A prompt token's log-probability is minus its id, its rank 2; the likeliest are 1 with -0.25 and 2 with -0.5."""

    async def generate(self, request):
        if request.wants == "tokens":
            async for update in super().generate(request):
                yield update
            return
        self.requests.append(request)
        rows = [[-float(token_id), 2, 1, 2, -0.25, -0.5] for token_id in request.prompt_token_ids[1:]]
        numbers = Numbers.of(np.array(rows, np.float32).reshape(-1, 6))
        yield SequenceUpdate(request_id=request.request_id, finish_reason="stop", numbers=numbers)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", [{"tokenized": ids(HE, 7, 8)}, {"text": "he"}])
def test_the_prompts_log_probabilities_come_once_for_each_answer(tokenizer, stream, prompt):
    backend = ScoringBackend()
    params = pb.SamplingParams(prompt_logprobs=1, n=2, max_tokens=2)
    request = pb.GenerateRequest(**prompt, request_id="mine", stream=stream, sampling_params=params)
    pieces = generate(tokenizer, request, backend)
    found = [(p.chunk if p.HasField("chunk") else p.complete) for p in pieces]
    having = [piece for piece in found if piece.HasField("input_logprobs")]
    assert sorted(piece.index for piece in having) == [0, 1]
    assert all(not stream or piece.completion_tokens == 1 for piece in having)
    scores = having[0].input_logprobs
    asked = [HE, 7, 8] if "tokenized" in prompt else [HE]
    assert list(scores.token_ids) == asked
    assert [one.value if one.HasField("value") else None for one in scores.token_logprobs] == [
        None, *(-token_id for token_id in asked[1:])
    ]  # fmt: skip
    assert [(list(top.token_ids), list(top.values)) for top in scores.top_logprobs] == [
        ([], []), *[([1], [-0.25])] * (len(asked) - 1)
    ]  # fmt: skip
    assert [request.wants for request in backend.requests] == ["token_logprobs", "tokens", "tokens"]
    assert {request.name for request in backend.requests} == {"mine"}


def test_a_prompt_with_more_log_probabilities_than_the_caller_takes_is_refused(tokenizer):
    """3 tokens with 20 likeliest ones each: 3 x (18 + 20 x 7) bytes."""
    params = pb.SamplingParams(prompt_logprobs=20)

    async def asked(served):
        call = served.vllm.Generate(
            pb.GenerateRequest(tokenized=ids(7, 8, 9), sampling_params=params), metadata=((RECEIVE_KEY, "400"),)
        )
        return [response async for response in call]

    with pytest.raises(grpc.aio.AioRpcError, match="474 bytes, this client takes 400") as raised:
        serve(asked, tokenizer, ScoringBackend())
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_stream_has_chunks_with_all_tokens_and_a_complete(tokenizer):
    params = pb.SamplingParams(max_tokens=2, logprobs=1)
    *chunks, last = generate(tokenizer, pb.GenerateRequest(tokenized=ids(7, 8, 9), stream=True, sampling_params=params))
    assert [list(c.chunk.token_ids) for c in chunks] == [[7], [8]]
    assert [c.chunk.completion_tokens for c in chunks] == [1, 2]
    assert [list(c.chunk.output_logprobs.token_logprobs) for c in chunks] == [[-7.0], [-8.0]]
    assert list(chunks[0].chunk.output_logprobs.top_logprobs[0].token_ids) == [7]
    assert (list(last.complete.output_ids), last.complete.finish_reason) == ([7, 8], "length")
    assert not last.complete.HasField("output_logprobs")


def test_a_matched_stop_is_a_text_or_a_token(tokenizer):
    """ "hello" is the token 259; a stop token ends the answer behind it, a stop string with it."""
    text = pb.GenerateRequest(text="hello", sampling_params=pb.SamplingParams(stop=["ello"]))
    assert generate(tokenizer, text)[0].complete.matched_stop_str == "ello"
    update = SequenceUpdate(request_id="x", token_ids=(HELLO, HE), finish_reason="stop")
    token = pb.GenerateRequest(text="hello", sampling_params=pb.SamplingParams(stop_token_ids=[HE]))
    assert generate(tokenizer, token, EchoBackend(script=[update]))[0].complete.matched_token_id == HE


def test_numbers_without_presence_are_as_they_stand(tokenizer):
    """The service's defaults are temperature 0.7 and top_k 20; in this protocol the caller applies them."""
    backend = EchoBackend()
    generate(tokenizer, pb.GenerateRequest(tokenized=ids(7)), backend)
    given = pb.SamplingParams(temperature=0.5, top_p=0.25, top_k=3, seed=9, logit_bias={5: 1.5}, repetition_penalty=1.5)
    generate(tokenizer, pb.GenerateRequest(tokenized=ids(7), sampling_params=given), backend)
    bare, full = (request.params for request in backend.requests)
    assert (bare.temperature, bare.top_k, bare.top_p, bare.repetition_penalty, bare.min_p) == (1.0, 0, 1.0, 1.0, 0.0)
    assert (full.temperature, full.top_k, full.top_p, full.repetition_penalty, full.seed) == (0.5, 3, 0.25, 1.5, 9)
    assert full.biases == ((5, 1.5),)


def test_n_answers_have_an_index_each_and_one_name(tokenizer):
    backend = EchoBackend()
    request = pb.GenerateRequest(tokenized=ids(7), request_id="mine", sampling_params=pb.SamplingParams(n=3))
    found = generate(tokenizer, request, backend)
    assert sorted(response.complete.index for response in found) == [0, 1, 2]
    assert {request.name for request in backend.requests} == {"mine"}


@pytest.mark.parametrize(
    ("given", "form"),
    [
        ({"regex": "a+"}, ("regex", "a+")),
        ({"grammar": "start: /a/"}, ("grammar", "start: /a/")),
        ({"choice": pb.ChoiceConstraint(choices=["a", "b"])}, ("choice", '["a", "b"]')),
    ],
)
def test_constraints_are_forms_of_answers(tokenizer, given, form):
    backend = EchoBackend()
    generate(tokenizer, pb.GenerateRequest(tokenized=ids(7), sampling_params=pb.SamplingParams(**given)), backend)
    assert backend.requests[0].constraint == form


PROMPT = {"tokenized": ids(7)}
REFUSED = {
    "no input": ({}, "input is empty"),
    "no tokens": ({"tokenized": ids()}, "token_ids is empty"),
    "a token that is none": ({"tokenized": ids(7, 999)}, "999"),
    "pictures": ({**PROMPT, "mm_inputs": pb.MultimodalInputs()}, "mm_inputs is set"),
    "media": ({**PROMPT, "media_refs": pb.MediaRefs()}, "media_refs is set"),
    "another engine's cache": ({**PROMPT, "kv_transfer_params_json": "{}"}, "kv_transfer_params_json is set"),
    "a rank": ({**PROMPT, "data_parallel_rank": 1}, "data_parallel_rank is 1"),
    "all of the prompt's logprobs": (
        {**PROMPT, "sampling_params": pb.SamplingParams(prompt_logprobs=-1)}, "prompt_logprobs is -1, 0 to 20"),
    "a cut prompt": (
        {**PROMPT, "sampling_params": pb.SamplingParams(truncate_prompt_tokens=1)}, "truncate_prompt_tokens is set"),
    "a structural tag": (
        {**PROMPT, "sampling_params": pb.SamplingParams(structural_tag="{}")}, "structural_tag is set"),
    "all logprobs": ({**PROMPT, "sampling_params": pb.SamplingParams(logprobs=-1)}, "logprobs is -1"),
    "too many answers": ({**PROMPT, "sampling_params": pb.SamplingParams(n=129)}, "n is 129"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_by_name(tokenizer, case):
    given, reason = REFUSED[case]
    with pytest.raises(grpc.aio.AioRpcError, match=reason) as raised:
        generate(tokenizer, pb.GenerateRequest(**given))
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_fields_of_a_newer_version_are_left_alone(tokenizer):
    """Field 2000 of varint 1, which no version has."""
    data = pb.GenerateRequest(tokenized=ids(7)).SerializeToString() + b"\x80\x7d\x01"

    async def scenario(served):
        call = served.channel.unary_stream(
            "/vllm.grpc.engine.VllmEngine/Generate", response_deserializer=pb.GenerateResponse.FromString
        )
        return await _all(call(data))

    assert serve(scenario, tokenizer)[0].complete.finish_reason == "stop"


def test_an_aborted_answer_ends_with_its_tokens_so_far(tokenizer):
    script = [
        SequenceUpdate(request_id="x", token_ids=(7,)), SequenceUpdate(request_id="x", finish_reason="cancelled"),
    ]  # fmt: skip
    chunk, last = generate(tokenizer, pb.GenerateRequest(tokenized=ids(7), stream=True), EchoBackend(script=script))
    assert list(chunk.chunk.token_ids) == [7]
    assert (list(last.complete.output_ids), last.complete.finish_reason) == ([7], "abort")


def test_an_abort_names_the_callers_requests(tokenizer):
    aborted = []

    async def abort(client, names):
        aborted.append((client, names))

    async def scenario(served):
        for names in (["a", "b"], []):
            await served.vllm.Abort(pb.AbortRequest(request_ids=names), metadata=(("x-client-id", "team"),))

    serve(scenario, tokenizer, view={"abort": abort})
    assert aborted == [("team", ("a", "b"))]


def test_embed_gives_the_last_hidden_state_divided_by_its_length(tokenizer):
    update = SequenceUpdate(request_id="x", finish_reason="stop", numbers=Numbers.of(np.array([3.0, 4.0], np.float32)))
    response = serve(
        lambda served: served.vllm.Embed(pb.EmbedRequest(tokenized=ids(7, 8))), tokenizer,
        EchoBackend(script=[update]), head=Head(kind="none"),
    )  # fmt: skip
    assert response.embedding == pytest.approx([0.6, 0.8])
    assert (response.prompt_tokens, response.embedding_dim) == (2, 2)


ENGINES = [
    EngineStats(
        running=2, waiting=1, used_blocks=3, num_blocks=10, generated_tokens=100, at=10.0, block_size=16,
        kv_cache_dtype="fp8",
    ),
    EngineStats(running=1, waiting=0, used_blocks=1, num_blocks=10, generated_tokens=50, at=11.0, block_size=16),
]  # fmt: skip


def test_loads_and_limits_are_the_clusters_sums(tokenizer):
    """Two engines of 8 sequences; between the two questions they make 40 tokens in 2 seconds."""
    later = [*ENGINES]

    async def scenario(served):
        server = await served.vllm.GetServerInfo(pb.GetServerInfoRequest())
        first = await served.vllm.GetLoads(pb.GetLoadsRequest(include=["core"]))
        later[1] = EngineStats(
            running=1, waiting=0, used_blocks=1, num_blocks=10, generated_tokens=90, at=13.0, block_size=16
        )
        return server, first, await served.vllm.GetLoads(pb.GetLoadsRequest())

    server, first, second = serve(scenario, tokenizer, view={"engines": lambda: later, "max_num_seqs": 8})
    assert (server.active_requests, server.max_num_seqs, server.data_parallel_size) == (4, 16, 1)
    assert server.last_receive_timestamp == 11.0
    assert (server.server_type, server.kv_cache_dtype, server.block_size) == ("vllm-grpc", "fp8", 16)
    [load] = first.loads
    assert (load.num_running_reqs, load.num_waiting_reqs, load.num_total_reqs) == (3, 1, 4)
    assert (load.num_used_tokens, load.max_total_num_tokens, load.token_usage) == (64, 320, 0.2)
    assert (load.max_running_requests, load.gen_throughput) == (16, 0.0)
    assert second.loads[0].gen_throughput == 20.0


def test_model_info_has_the_checkpoints_words(tokenizer):
    published = PublishedConfig(model_type="qwen2_moe", architectures=("Qwen2MoeForCausalLM",), pad_token_id=5)
    view = {"published": published, "defaults": SamplingParams(temperature=0.7, top_k=20, max_tokens=99)}
    info = serve(lambda served: served.vllm.GetModelInfo(pb.GetModelInfoRequest()), tokenizer, view=view)
    assert (info.served_model_name, info.model_path, info.tokenizer_path) == ("tiny", "tiny", "")
    assert (info.max_context_length, info.vocab_size, list(info.eos_token_ids)) == (64, 300, [IM_END])
    assert (info.model_type, list(info.architectures)) == ("qwen2_moe", ["Qwen2MoeForCausalLM"])
    assert (info.pad_token_id, info.bos_token_id, info.max_req_input_len, info.is_generation) == (5, 0, 63, True)
    assert json.loads(info.default_sampling_params_json) == {"temperature": 0.7, "top_k": 20, "max_tokens": 99}


def test_the_tokenizer_comes_as_a_zip_file_in_chunks_with_its_hash(tokenizer):
    files = {"tokenizer.json": "{}", "chat_template.jinja": "".join(map(chr, range(0x4E00, 0x9F00))) * 3}
    view = {"tokenizer_files": lambda: files}
    chunks = serve(
        lambda served: _all(served.vllm.GetTokenizer(common_pb2.GetTokenizerRequest())), tokenizer, view=view
    )
    data = b"".join(chunk.data for chunk in chunks)
    assert len(chunks) > 1
    assert [chunk.sha256 for chunk in chunks] == [""] * (len(chunks) - 1) + [hashlib.sha256(data).hexdigest()]
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert {name: archive.read(name).decode() for name in archive.namelist()} == files


def test_without_a_tokenizer_there_is_none_to_give(tokenizer):
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        serve(lambda served: _all(served.vllm.GetTokenizer(common_pb2.GetTokenizerRequest())), tokenizer)
    assert raised.value.code() == grpc.StatusCode.NOT_FOUND


def test_cache_events_are_not_told_and_the_reason_is(tokenizer):
    with pytest.raises(grpc.aio.AioRpcError, match="a cache of its own") as raised:
        serve(lambda served: _all(served.vllm.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest())), tokenizer)
    assert raised.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_health_needs_no_key_and_all_else_does(tokenizer, tmp_path):
    (tmp_path / "keys").write_text(new_key("team")[1])

    async def scenario(served):
        healthy = [(await served.vllm.HealthCheck(pb.HealthCheckRequest())).healthy]
        served.ingress.health.set(False)
        state = await served.vllm.HealthCheck(pb.HealthCheckRequest())
        for call in (
            served.vllm.Abort(pb.AbortRequest(request_ids=["a"])),
            served.vllm.GetModelInfo(pb.GetModelInfoRequest()),
            _all(served.vllm.Generate(pb.GenerateRequest(tokenized=ids(7)))),
            _all(served.vllm.GetTokenizer(common_pb2.GetTokenizerRequest())),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await call
            assert raised.value.code() == grpc.StatusCode.UNAUTHENTICATED
        return [*healthy, state.healthy], state.message

    found, message = serve(scenario, tokenizer, keys=ApiKeys(tmp_path / "keys", lambda: 0.0))
    assert found == [True, False]
    assert "no requests are answered" in message
