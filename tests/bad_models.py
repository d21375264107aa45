"""Checkpoints that are not served, with the reason as a user reads it. docs/models.md has them as a table."""

from dataclasses import dataclass, field
from typing import Any

WAYS = ("plan", "serve", "LLM")


@dataclass(frozen=True)
class BadModel:
    """config: keys of config.json that differ.  without: a file that is missing.  in_place_of_weights: a file that is
    there instead.  options: for each of WAYS.  message: a part of the line."""

    name: str
    message: str
    config: dict[str, Any] = field(default_factory=dict)
    without: str = ""
    in_place_of_weights: str = ""
    options: dict[str, int] = field(default_factory=dict)


BAD_MODELS = [
    BadModel(
        "another architecture", "model_type is 'llama', one of qwen2, qwen2_moe is needed", {"model_type": "llama"}
    ),
    BadModel(
        "another head", "architectures has 'Qwen2MoeForMaskedLM', one of Qwen2MoeForCausalLM, Qwen2MoeModel,",
        {"architectures": ["Qwen2MoeForMaskedLM"]},
    ),
    BadModel(
        "a head that the checkpoint lacks", "score.weight is missing",
        {"architectures": ["Qwen2MoeForSequenceClassification"]},
    ),
    BadModel(
        "another rope type", "rope type 'su' is not served: default, linear, dynamic, yarn, llama3 and longrope are",
        {"rope_scaling": {"type": "su", "factor": 2.0}},
    ),
    BadModel("a rotation of a part of each head", "only a full rotation is", {"partial_rotary_factor": 0.5}),
    BadModel("another activation", "hidden_act is 'gelu', only 'silu' is served", {"hidden_act": "gelu"}),
    BadModel(
        "weights quantized otherwise", "served are gptq, awq, compressed-tensors, and weights in 16 bits",
        {"quantization_config": {"quant_method": "bitnet", "bits": 2}},
    ),
    BadModel(
        "another dtype", "dtype is 'float8_e4m3fn', one of float32, bfloat16, float16, float64 is needed",
        {"torch_dtype": "float8_e4m3fn"},
    ),
    BadModel(
        "more experts a token than experts", "num_experts_per_tok (65) is more than num_experts (64)",
        {"num_experts_per_tok": 65},
    ),
    BadModel("a config of other weights", "implies [96, 64]", {"num_key_value_heads": 1, "head_dim": 24}),
    BadModel("no config", "config.json is missing", without="config.json"),
    BadModel(
        "a missing file of weights", "names model-00002-of-00003.safetensors which is not there",
        without="model-00002-of-00003.safetensors",
    ),
    BadModel(
        "pickled weights", "moe-cluster convert --from-pickle",
        in_place_of_weights="pytorch_model.bin",
    ),
    BadModel(
        "an adapter alone", "holds an adapter, not a whole model: merge it into its base",
        in_place_of_weights="adapter_config.json",
    ),
    BadModel(
        "dual chunk attention", "dual chunk attention (dual_chunk_attention_config) is not served",
        {"dual_chunk_attention_config": {"chunk_size": 64, "local_size": 16, "original_max_position_embeddings": 32}},
    ),
    BadModel(
        "a context beyond the model's", "max_model_len is 4097, the checkpoint's context has 4096 tokens",
        options={"max_model_len": 4097},
    ),
    BadModel("text without a tokenizer", "tokenizer.json is missing", without="tokenizer.json"),
]  # fmt: skip
