"""The front of gateways for vLLM's engines: `vllm.grpc.engine.VllmEngine` over the inference service."""
