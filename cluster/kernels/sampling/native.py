"""The tokens of a batch by the native kernel (native/sampling.inc). B: rows, V: vocabulary."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cluster.kernels.native.library import DTYPES, Native
from cluster.kernels.sampling.rule import NO_IDS, NOT_FINITE, Chosen, Mask, Rule

_RULE = struct.Struct("dddfffiqQqqqq")  # SamplingRule of kernels.h
_BANNED = -1  # in place of a count
_NUMBERS_FOR_A_THREAD = 1 << 15  # fewer logits are read before another thread has begun


@dataclass(frozen=True, slots=True)
class PackedRules:
    """Rules as the kernel reads them.

    rules: bytes.  ids, counts: the changed tokens of all rows, int32.  masks: [n, V / 32] int32, of the rows that have
    one.  most_changes: of a row.
    """

    rules: Tensor
    ids: Tensor
    counts: Tensor
    masks: Tensor
    most_changes: int


def choose_natively(native: Native, logits: Tensor, rules: Sequence[Rule], num_threads: int) -> Chosen:
    """logits: [B, V] on the CPU, float32, bfloat16 or float16, each row's numbers side by side; a rule for each row."""
    num_rows, vocab_size = logits.shape
    num_top = max(0, min(max(rule.num_top for rule in rules), vocab_size))
    packed = pack(rules)
    assert not packed.masks.numel() or 32 * packed.masks.shape[1] >= vocab_size, "a mask has a bit for each token"
    num_threads = max(1, min(num_threads, num_rows, logits.numel() // _NUMBERS_FOR_A_THREAD))
    scratch_bytes = native.choose_tokens_scratch(vocab_size, packed.most_changes)
    scratch = torch.empty(num_threads * scratch_bytes, dtype=torch.uint8)
    tokens = torch.full((num_rows,), NOT_FINITE)
    logprobs = torch.zeros(num_rows, dtype=torch.float32)
    top_ids = torch.zeros(num_rows, num_top, dtype=torch.int32)
    top_logprobs = torch.zeros(num_rows, num_top, dtype=torch.float32)
    native.choose_tokens(
        DTYPES[logits.dtype], logits.data_ptr(), logits.stride(0), num_rows, vocab_size, packed.rules.data_ptr(),
        packed.ids.data_ptr(), packed.counts.data_ptr(), packed.masks.data_ptr(), packed.masks.shape[1],
        tokens.data_ptr(), logprobs.data_ptr(), num_top, top_ids.data_ptr(), top_logprobs.data_ptr(),
        packed.most_changes, scratch.data_ptr(), num_threads,
    )  # fmt: skip
    return Chosen(tokens.tolist(), logprobs.tolist(), top_ids.tolist(), top_logprobs.tolist())


def pack(rules: Sequence[Rule]) -> PackedRules:
    ids, counts, numbers = [NO_IDS], [NO_IDS], []
    masks: list[Mask] = []
    first = most = 0
    for rule in rules:
        num_changes = len(rule.ids) + len(rule.banned)
        if num_changes:
            ids += (rule.ids, rule.banned)
            counts += (rule.counts, np.full(len(rule.banned), _BANNED, dtype=np.int32))
        numbers.append(
            _RULE.pack(
                rule.temperature, rule.top_p, rule.max_distance, rule.repetition, rule.presence, rule.frequency,
                rule.num_top, rule.top_k, rule.seed, rule.position, first, num_changes,
                -1 if rule.allowed is None else len(masks),
            )
        )  # fmt: skip
        if rule.allowed is not None:
            masks.append(rule.allowed)
        first += num_changes
        most = max(most, num_changes)
    return PackedRules(
        torch.frombuffer(bytearray(b"".join(numbers)), dtype=torch.uint8),
        torch.from_numpy(np.concatenate(ids, dtype=np.int32, casting="same_kind")),
        torch.from_numpy(np.concatenate(counts, dtype=np.int32, casting="same_kind")),
        torch.from_numpy(np.stack(masks)) if masks else torch.empty(0, 0, dtype=torch.int32),
        most,
    )
