"""Names in a call's metadata, and limits, on which clients and servers of `moecluster.v1` agree. Knows no gRPC."""

RECEIVE_KEY = "x-max-receive-bytes"  # a client that takes larger answers than gRPC's default says so with it
DEFAULT_RECEIVE_BYTES = 4 << 20  # gRPC's own
MAX_ANSWER_BYTES = 64 << 20  # the server sends no larger answer
RETRY_KEY = "grpc-retry-pushback-ms"  # gRPC's own name: clients with a retry policy follow it by themselves
# Rpcs that ask for the health, beside grpc.health.v1's: they need no key.
HEALTH_METHODS = (
    "/vllm.grpc.engine.VllmEngine/HealthCheck",
    "/inference.GRPCInferenceService/ServerLive",
    "/inference.GRPCInferenceService/ServerReady",
    "/inference.GRPCInferenceService/ModelReady",
)
