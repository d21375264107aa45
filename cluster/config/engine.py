"""One engine's limits. Knows no checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.config.kv_cache import AUTO, EIGHT_BITS, check_cache_device
from cluster.config.lora import MAX_RANK, check_adapters
from cluster.config.model import DTYPES
from cluster.config.options import MOST_BYTES, MOST_CALLS, MOST_SEQS, MOST_TOKENS, check, option
from cluster.config.quantization import PLAIN, QUANTIZATIONS
from cluster.config.speculation import FIELD, Speculation, read_speculation
from cluster.errors import SetupError

MOST_RANKS = 1024  # more than any known model has query heads


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Raises SetupError for values that cannot work."""

    dtype: str = option("auto", "float32, bfloat16, float16, or auto: the checkpoint's", choices=("auto", *DTYPES))
    quantization: str = option(
        PLAIN,
        "rounds weights while they are loaded: int8; int4 with groups of 128 inputs, or of 32 or 64 (int4-32) "
        "and with a zero for each group (int4-32-zeros); nf4; the last layer too (int4+lm_head); none: as they are",
        choices=(PLAIN, *QUANTIZATIONS),
    )
    expert_quantization: str | None = option(
        None, "the same for the routed experts; unset: as quantization", choices=(PLAIN, *QUANTIZATIONS)
    )
    kv_cache_dtype: str = option(
        AUTO,
        "keys and values in 8 bits, on CPUs: int8, or fp8 (e4m3), each token's of a head with a scale of 2 bytes; "
        "auto: as dtype",
        choices=(AUTO, *EIGHT_BITS),
    )
    device: str = option("auto", "cpu, cuda, or auto: cuda where a process has one", choices=("auto", "cpu", "cuda"))
    block_size: int = option(16, "tokens in a block of the KV cache", least=1, most=MOST_TOKENS)
    kv_cache_bytes: int | None = option(
        None,
        "memory for the keys and values of each attention replica; unset: as memory_utilization says",
        least=1,
        most=MOST_BYTES,
    )
    memory_utilization: float | None = option(
        None,
        "share of the memory that is free once the weights are loaded, for the keys and values of the replicas that "
        "share it (a control group's limit counts), and never more than max_num_seqs contexts; unset: 0.9 on a GPU, "
        "else 0.5",
        least=0.01,
        most=1,
    )
    max_num_seqs: int = option(64, "sequences in one step of an engine at most", least=1, most=MOST_SEQS)
    max_num_batched_tokens: int = option(
        2048, "tokens in one step at most, decode rows and prefill chunks together", least=1, most=MOST_TOKENS
    )
    max_model_len: int | None = option(
        None, "tokens of prompt and answer together at most; unset: the checkpoint's context", least=1, most=MOST_TOKENS
    )
    rope_scaling: Mapping[str, Any] | None = option(
        None,
        "an object in place of the checkpoint's rope_scaling, with the same keys, for another context length; unset: "
        "the checkpoint's",
    )
    tensor_parallel_size: int = option(
        1,
        "processes that share the dense weights, the keys and values of one attention replica, each with a part of the "
        "heads, of inner sizes and of the vocabulary; CPUs, GPUs and kv_cache_bytes are of each of them",
        least=1,
        most=MOST_RANKS,
    )
    max_waiting: int = option(
        256,
        "requests that may queue for an engine, a further one gets RESOURCE_EXHAUSTED; 0: none queues, and answers "
        "keep their latency under any load",
        least=0,
        most=MOST_CALLS,
    )
    cuda_graphs: bool = option(
        True, "on a GPU, decode steps are captured once for each size and replayed, with one launch for many"
    )
    lora_adapters: Mapping[str, Any] | None = option(
        None,
        "LoRA adapters beside the model: the directory of each by the name that requests give as model; unset: none",
    )
    max_lora_rank: int = option(64, "the highest rank of an adapter", least=1, most=MAX_RANK)
    max_loras: int = option(
        16, "adapters that are loaded at a time; any of them may be in one step", least=1, most=MOST_SEQS
    )
    enable_prefix_caching: bool = option(True, "prompts that begin alike share the keys and values of their beginning")
    speculative_config: Mapping[str, Any] | None = option(
        None,
        "guesses tokens ahead and has several in a step where that is measured to pay, with the same answers; an "
        "object with vLLM's keys: method (ngram or draft_model), num_speculative_tokens, prompt_lookup_max, "
        "prompt_lookup_min, model; unset: one token a step",
    )

    def __post_init__(self) -> None:
        check(self)
        check_adapters(self.lora_adapters, self.max_loras)
        self.check_speculation()
        check_cache_device(self.kv_cache_dtype, self.device)

    def cache_dtype(self, dtype: str) -> str:
        """That of keys and values beside weights in `dtype`: a key of DTYPE_BYTES, or one of EIGHT_BITS."""
        return dtype if self.kv_cache_dtype == AUTO else self.kv_cache_dtype

    @property
    def of_experts(self) -> str:
        """The quantization of the routed experts."""
        return self.quantization if self.expert_quantization is None else self.expert_quantization

    @property
    def speculation(self) -> Speculation | None:
        return read_speculation(self.speculative_config)

    def check_speculation(self) -> None:
        """Raises SetupError."""
        speculation = self.speculation
        if speculation is not None and speculation.num_speculative_tokens >= self.max_num_batched_tokens:
            raise SetupError(
                f"{FIELD}: num_speculative_tokens is {speculation.num_speculative_tokens}, less than "
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) is needed"
            )
