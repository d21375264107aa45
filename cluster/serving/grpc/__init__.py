"""One front: `moecluster.v1` and `grpc.health.v1` over the inference service."""
