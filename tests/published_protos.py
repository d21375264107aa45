"""tests/data/published_protos.json: the gateways' protocols as others publish them.

Written by `python tests/published_protos.py`, in an environment with smg-grpc-proto 0.4.28 and tritonclient[grpc] 2.73.
"""

import json
from pathlib import Path

PAGE = Path(__file__).parent / "data" / "published_protos.json"
SERVICES = ("vllm.grpc.engine.VllmEngine", "inference.GRPCInferenceService")


def described(*services):
    """Of service descriptors: rpcs by their path, and the fields of all messages that these need, by message."""
    rpcs, found = {}, {}
    for service in services:
        for method in service.methods:
            kinds = [method.client_streaming, method.server_streaming]
            path = f"{service.full_name}/{method.name}"
            rpcs[path] = [method.input_type.full_name, method.output_type.full_name, *kinds]
            for message in (method.input_type, method.output_type):
                _describe(message, found)
    return {"rpcs": rpcs, "messages": found}


def _describe(message, found):
    if message.full_name in found:
        return
    fields = found[message.full_name] = {}
    for field in message.fields:
        oneof = field.containing_oneof.name if field.containing_oneof else ""
        kind = field.message_type.full_name if field.message_type else field.type
        fields[field.name] = [field.number, kind, bool(field.is_repeated), oneof]
        if field.message_type:
            _describe(field.message_type, found)


if __name__ == "__main__":
    from smg_grpc_proto import vllm_engine_pb2
    from tritonclient.grpc import service_pb2

    files = (vllm_engine_pb2, service_pb2)
    published = described(
        *(file.DESCRIPTOR.services_by_name[name.rpartition(".")[2]] for file, name in zip(files, SERVICES, strict=True))
    )
    served = {"ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer"}
    kept = {
        p: r for p, r in published["rpcs"].items() if "vllm" in p or p.split("/")[1] in {*served, "ModelStreamInfer"}
    }
    needed, left = set(), [name for rpc in kept.values() for name in rpc[:2]]
    while left:
        if (name := left.pop()) not in needed:
            needed.add(name)
            left += [field[1] for field in published["messages"][name].values() if isinstance(field[1], str)]
    messages = {name: fields for name, fields in sorted(published["messages"].items()) if name in needed}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(fields)}" for name, fields in messages.items())
    rpcs = ",\n".join(f"  {json.dumps(name)}: {json.dumps(rpc)}" for name, rpc in sorted(kept.items()))
    PAGE.write_text(f'{{"rpcs": {{\n{rpcs}\n}}, "messages": {{\n{lines}\n}}}}\n')
