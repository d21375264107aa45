"""The other gRPC handlers of `vllm.grpc.engine.VllmEngine`: vectors, health, aborts, the model, the load, its files."""

import asyncio
import hashlib
import io
import json
import time
import zipfile
from collections.abc import AsyncGenerator, Mapping
from datetime import UTC, datetime

from cluster.errors import InvalidRequest, NotFound, Unserved
from cluster.pb.smg.grpc.common import common_pb2
from cluster.pb.vllm.grpc.engine import vllm_engine_pb2 as pb
from cluster.serving.grpc.calls import may_ask
from cluster.serving.grpc.context import GrpcContext, fail_stream, set_status
from cluster.serving.grpc.gateways import GatewayView
from cluster.serving.grpc.vllm.handlers import VllmGenerate
from cluster.serving.grpc.vllm.messages import check_rank
from cluster.serving.outcomes import unit_vector
from cluster.serving.text.prompts import Prompt
from cluster.version import __version__

CHUNK_BYTES = 64 << 10  # of the tokenizer's zip file; gRPC's messages have 4 MiB at most
MAX_ABORTS = 1024  # names in one call
ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest that there is: the same files are the same bytes
DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_tokens")


class VllmEngineService(VllmGenerate):
    """A mixin of the ingress deployment: one method an rpc, "Vllm" before its name. Not thread-safe."""

    def open_vllm_engine(self, view: GatewayView) -> None:
        """To be called before the first rpc."""
        self._seen = view
        self._since_s = time.monotonic()
        self._last_tokens: tuple[int, float] | None = None

    async def VllmEmbed(self, request: bytes, grpc_context: GrpcContext) -> pb.EmbedResponse:
        async def answer(message: pb.EmbedRequest, client: str) -> pb.EmbedResponse:
            prompt = Prompt(token_ids=tuple(message.tokenized.input_ids))
            name = message.request_id
            computed = await self._service.compute(prompt, "last_hidden_state", request_id=name, client=client)
            vector = unit_vector(computed.numbers.array())
            return pb.EmbedResponse(
                embedding=vector, prompt_tokens=len(computed.prompt_token_ids), embedding_dim=len(vector)
            )

        return await self._answer(request, grpc_context, pb.EmbedRequest, pb.EmbedResponse, answer)

    async def VllmHealthCheck(self, request: bytes, grpc_context: GrpcContext) -> pb.HealthCheckResponse:
        if not may_ask(self._service.admission, grpc_context):
            return pb.HealthCheckResponse()
        healthy = self._seen.health.serving
        reason = "it drains" if self._seen.draining() else "replicas or experts are not up"
        return pb.HealthCheckResponse(healthy=healthy, message="" if healthy else f"no requests are answered: {reason}")

    async def VllmAbort(self, request: bytes, grpc_context: GrpcContext) -> pb.AbortResponse:
        async def answer(message: pb.AbortRequest, client: str) -> pb.AbortResponse:
            names = tuple(message.request_ids)
            if len(names) > MAX_ABORTS:
                raise InvalidRequest(
                    f"request_ids has {len(names)} names, at most {MAX_ABORTS} are allowed", "request_ids"
                )
            if names:
                await self._seen.abort(client, names)
            return pb.AbortResponse()

        return await self._answer(request, grpc_context, pb.AbortRequest, pb.AbortResponse, answer)

    async def VllmGetModelInfo(self, request: bytes, grpc_context: GrpcContext) -> pb.GetModelInfoResponse:
        async def answer(_: pb.GetModelInfoRequest, __: str) -> pb.GetModelInfoResponse:
            info, published = self._service.info, self._seen.published
            given = {name: getattr(self._seen.defaults, name) for name in DEFAULTS}
            return pb.GetModelInfoResponse(
                model_path=info.model_id,
                served_model_name=info.model_id,
                is_generation=info.head.generates,
                max_context_length=info.max_model_len,
                max_req_input_len=info.max_model_len - 1,
                vocab_size=info.vocab_size,
                model_type=published.model_type,
                architectures=published.architectures,
                eos_token_ids=info.eos_token_ids,
                pad_token_id=published.pad_token_id or 0,
                bos_token_id=published.bos_token_id or 0,
                default_sampling_params_json=json.dumps({k: v for k, v in given.items() if v is not None}),
            )

        return await self._answer(request, grpc_context, pb.GetModelInfoRequest, pb.GetModelInfoResponse, answer)

    async def VllmGetServerInfo(self, request: bytes, grpc_context: GrpcContext) -> pb.GetServerInfoResponse:
        async def answer(_: pb.GetServerInfoRequest, __: str) -> pb.GetServerInfoResponse:
            engines = self._seen.engines()
            return pb.GetServerInfoResponse(
                active_requests=sum(engine.running + engine.waiting for engine in engines),
                is_paused=self._seen.draining(),
                last_receive_timestamp=max((engine.at for engine in engines), default=0.0),
                uptime_seconds=time.monotonic() - self._since_s,
                server_type="vllm-grpc",
                data_parallel_size=1,
                kv_cache_dtype=engines[0].kv_cache_dtype if engines else "",
                block_size=engines[0].block_size if engines else 0,
                model_dtype=self._service.info.dtype,
                max_num_seqs=len(engines) * self._seen.max_num_seqs,
                constrained_decoding_start="first_token",
            )

        return await self._answer(request, grpc_context, pb.GetServerInfoRequest, pb.GetServerInfoResponse, answer)

    async def VllmGetLoads(self, request: bytes, grpc_context: GrpcContext) -> pb.GetLoadsResponse:
        async def answer(message: pb.GetLoadsRequest, __: str) -> pb.GetLoadsResponse:
            check_rank(message, "dp_rank")
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            return pb.GetLoadsResponse(timestamp=now, version=__version__, dp_rank_count=1, loads=[self._load()])

        return await self._answer(request, grpc_context, pb.GetLoadsRequest, pb.GetLoadsResponse, answer)

    def _load(self) -> pb.SchedulerLoad:
        engines = self._seen.engines()
        running, waiting = sum(e.running for e in engines), sum(e.waiting for e in engines)
        used = sum(e.used_blocks * e.block_size for e in engines)
        room = sum(e.num_blocks * e.block_size for e in engines)
        return pb.SchedulerLoad(
            num_running_reqs=running,
            num_waiting_reqs=waiting,
            num_total_reqs=running + waiting,
            num_used_tokens=used,
            max_total_num_tokens=room,
            token_usage=used / room if room else 0.0,
            gen_throughput=self._throughput(),
            max_running_requests=len(engines) * self._seen.max_num_seqs,
        )

    def _throughput(self) -> float:
        """Tokens a second since the state that the call before saw; 0 where an engine has been replaced."""
        engines = self._seen.engines()
        if not engines:
            return 0.0
        tokens, at = sum(e.generated_tokens for e in engines), max(e.at for e in engines)
        before, self._last_tokens = self._last_tokens, (tokens, at)
        if before is None or at <= before[1]:
            return 0.0
        return max(0.0, (tokens - before[0]) / (at - before[1]))

    async def VllmGetTokenizer(
        self, request: bytes, grpc_context: GrpcContext
    ) -> AsyncGenerator[common_pb2.GetTokenizerChunk, None]:
        try:
            with self._counted(grpc_context, common_pb2.GetTokenizerRequest):
                data, digest = await asyncio.to_thread(lambda: _zipped(self._seen.tokenizer_files()))
                for start in range(0, len(data), CHUNK_BYTES):
                    piece = data[start : start + CHUNK_BYTES]
                    last = start + CHUNK_BYTES >= len(data)
                    yield common_pb2.GetTokenizerChunk(data=piece, sha256=digest if last else "")
        except Exception as error:  # noqa: BLE001 the boundary: nothing may pass but a code and a message
            if self._raise_failures:
                fail_stream(grpc_context, error, "")
            set_status(grpc_context, error)

    async def VllmSubscribeKvEvents(
        self, request: bytes, grpc_context: GrpcContext
    ) -> AsyncGenerator[common_pb2.KvEventBatch, None]:
        error = Unserved(
            "SubscribeKvEvents: each attention replica has a cache of its own, and the cluster chooses the replica: no "
            "gateway could tell from events which cache its next request meets"
        )
        if self._raise_failures:
            fail_stream(grpc_context, error, "")
        set_status(grpc_context, error)
        nothing: tuple[common_pb2.KvEventBatch, ...] = ()
        for batch in nothing:
            yield batch


def _zipped(files: Mapping[str, str]) -> tuple[bytes, str]:
    """A zip file and its SHA-256, the same for the same files. Raises NotFound without any."""
    if not files:
        raise NotFound("this server has left out the tokenizer, and takes token ids alone", "request")
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in sorted(files.items()):
            archive.writestr(zipfile.ZipInfo(name, ZIP_DATE), text.encode(), zipfile.ZIP_DEFLATED)
    data = made.getvalue()
    return data, hashlib.sha256(data).hexdigest()
