"""The front of KServe's and Triton's clients: `inference.GRPCInferenceService` over the inference service."""
