"""The gateways' services behind a plain grpc.aio server on loopback, and tensors as Triton's client sends them."""

import asyncio
import inspect
from contextlib import asynccontextmanager

import grpc
from serving_fakes import EchoBackend, make_service

from cluster.pb.inference import grpc_service_pb2 as kserve
from cluster.pb.inference import grpc_service_pb2_grpc
from cluster.pb.vllm.grpc.engine import vllm_engine_pb2_grpc
from cluster.serving.grpc.exchange import gated_exchange
from cluster.serving.grpc.gateways import GatewayView
from cluster.serving.grpc.handlers import GrpcInferenceService
from cluster.serving.grpc.kserve.handlers import KServeService
from cluster.serving.grpc.registration import add_inference_service
from cluster.serving.grpc.vllm.engine import VllmEngineService
from cluster.serving.health import HealthState


class Ingress(GrpcInferenceService, VllmEngineService, KServeService):
    """One behind HAProxy: a stream that failed just ends, with its status."""

    def __init__(self, service, **view):
        super().__init__(service, raise_failures=False)
        self.health = HealthState()
        self.health.set(True)
        seen = GatewayView(health=self.health, **view)
        self.open_vllm_engine(seen)
        self.open_kserve(seen)


class Servicer:
    """Calls an ingress as Serve does."""

    def __init__(self, ingress):
        self._ingress = ingress

    def __getattr__(self, name):
        method = getattr(self._ingress, name)

        async def unary(request, context):
            return await method(request, context)

        async def stream(request, context):
            async for response in method(request, context):
                yield response

        async def written(request, context):
            async for response in method(request, context):
                await context.write(response)

        if name == "ModelStreamInfer":
            return gated_exchange(written, lambda: self._ingress)
        return stream if inspect.isasyncgenfunction(method) else unary


class Served:
    def __init__(self, channel, ingress, backend):
        self.ingress, self.backend, self.channel = ingress, backend, channel
        self.vllm = vllm_engine_pb2_grpc.VllmEngineStub(channel)
        self.kserve = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)


def serve(scenario, tokenizer, backend=None, *, view=(), **service):
    """Runs an async scenario(served) against a server; returns its outcome."""
    backend = backend or EchoBackend()

    @asynccontextmanager
    async def running():
        ingress, server = Ingress(make_service(tokenizer, backend, **service), **dict(view)), grpc.aio.server()
        add_inference_service(Servicer(ingress), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                yield Served(channel, ingress, backend)
        finally:
            await server.stop(None)

    async def main():
        async with running() as served:
            return await asyncio.wait_for(scenario(served), 20)

    return asyncio.run(main())


def infer_request(text="hello", *, model="tiny", raw=True, parameters=None, request_id="", **given):
    """A request with the tensors of Triton's vLLM backend: bytes and truth values by their names."""
    request = kserve.ModelInferRequest(model_name=model, id=request_id)
    for name, value in {"text_input": text, **given}.items():
        boolean = isinstance(value, bool)
        tensor = request.inputs.add(name=name, datatype="BOOL" if boolean else "BYTES", shape=[1])
        data = value if boolean else value.encode() if isinstance(value, str) else value
        if raw:
            request.raw_input_contents.append(bytes([data]) if boolean else len(data).to_bytes(4, "little") + data)
        elif boolean:
            tensor.contents.bool_contents.append(data)
        else:
            tensor.contents.bytes_contents.append(data)
    for name, value in (parameters or {}).items():
        kind = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}[type(value)]
        setattr(request.parameters[name], kind, value)
    return request
