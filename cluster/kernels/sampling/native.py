"""The tokens of a batch by the native kernel (native/sampling.inc). B: rows, V: vocabulary."""

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from cluster.kernels.native.library import DTYPES, Native
from cluster.kernels.sampling.rule import NOT_FINITE, Chosen, Ids, Rule

_RULE = struct.Struct("dddfffiqQqPPqPq")  # SamplingRule of kernels.h
_NUMBERS_FOR_A_THREAD = 1 << 15  # fewer logits are read before another thread has begun


def choose_natively(native: Native, logits: Tensor, rules: Sequence[Rule], num_threads: int) -> Chosen:
    """logits: [B, V] on the CPU, float32, bfloat16 or float16, each row's numbers side by side; a rule for each row."""
    num_rows, vocab_size = logits.shape
    num_top = max(0, min(max(rule.num_top for rule in rules), vocab_size))
    num_changes = max(len(rule.ids) + len(rule.banned) for rule in rules)
    num_threads = max(1, min(num_threads, num_rows, logits.numel() // _NUMBERS_FOR_A_THREAD))
    scratch = torch.empty(num_threads * native.choose_tokens_scratch(vocab_size, num_changes), dtype=torch.uint8)
    tokens = torch.full((num_rows,), NOT_FINITE)
    logprobs = torch.zeros(num_rows)
    top_ids = torch.zeros(num_rows, num_top, dtype=torch.int32)
    top_logprobs = torch.zeros(num_rows, num_top)
    native.choose_tokens(
        DTYPES[logits.dtype], logits.data_ptr(), logits.stride(0), num_rows, vocab_size, packed(rules),
        tokens.data_ptr(), logprobs.data_ptr(), num_top, top_ids.data_ptr(), top_logprobs.data_ptr(), num_changes,
        scratch.data_ptr(), num_threads,
    )  # fmt: skip
    return Chosen(tokens.tolist(), logprobs.tolist(), top_ids.tolist(), top_logprobs.tolist())


def packed(rules: Sequence[Rule]) -> bytes:
    """The rules as the kernel reads them. They must live as long: it reads their ids in place."""
    return b"".join(
        [
            _RULE.pack(
                rule.temperature, rule.top_p, rule.max_distance, rule.repetition, rule.presence, rule.frequency,
                rule.num_top, rule.top_k, rule.seed, rule.position, _address(rule.ids), _address(rule.counts),
                len(rule.ids), _address(rule.banned), len(rule.banned),
            )
            for rule in rules
        ]
    )  # fmt: skip


def _address(ids: Ids) -> int:
    address: int = ids.__array_interface__["data"][0] if len(ids) else 0
    return address
