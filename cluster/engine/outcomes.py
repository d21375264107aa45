"""Results other than tokens: the part that a step's rows give of one, and the whole of its parts. Knows no queue.

A result grows with each chunk of its prompt, so that no more of a long one is held than its result needs.
t: a sequence's rows in the step, T: all of its tokens, H: hidden size, V: vocabulary, L: labels. Numbers are float32,
on the CPU.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from cluster.engine.sequence import Sequence
from cluster.engine.step import ScheduledSequence
from cluster.model.adapters import head_adapters
from cluster.model.decoder import CausalLM
from cluster.model.sampler import NoFiniteNumbers
from cluster.outcome import Numbers, Wants

LOGIT_ROWS = 256  # rows whose logits are held at a time: 150 MB of float32 with a vocabulary of 152,000

_Members = list[tuple[ScheduledSequence, Tensor]]  # and each one's rows [t, H]


def parts_of(
    model: CausalLM, scheduled: Seq[ScheduledSequence], hidden_states: Tensor, chosen: Iterable[int]
) -> tuple[dict[int, Tensor], dict[int, Exception]]:
    """The parts that a step brings the chosen sequences, by their number, or NoFiniteNumbers for them.

    None for a sequence that wants its last row alone and has not come to it. hidden_states: of all rows of the step.
    """
    rows = torch.split(hidden_states, [s.num_rows for s in scheduled])
    by_kind: dict[Wants, list[int]] = {}
    for i in chosen:
        sequence = scheduled[i].sequence
        if sequence.wants_every_row or scheduled[i].completes:
            by_kind.setdefault(sequence.request.wants, []).append(i)
    parts: dict[int, Tensor] = {}
    for wants, members in by_kind.items():
        parts |= zip(members, _parts(model, wants, [(scheduled[i], rows[i]) for i in members]), strict=True)
    failed: dict[int, Exception] = {}
    for i, part in parts.items():
        if not _is_sound(part, scheduled[i].sequence):
            failed[i] = NoFiniteNumbers("a number of a result is NaN or infinite")
    return {i: part for i, part in parts.items() if i not in failed}, failed


class Gathering:
    """Keeps the parts of results until they are whole. Used by one thread."""

    def __init__(self) -> None:
        self._parts: dict[Sequence, list[Tensor]] = {}

    def add(self, sequence: Sequence, part: Tensor | None, *, first: int) -> None:
        """first: the number of tokens computed before. A sequence that lost its blocks begins again at 0."""
        parts = self._parts.setdefault(sequence, [])
        if not first:
            parts.clear()
        if part is not None:
            parts.append(part)

    def whole(self, sequence: Sequence) -> Numbers:
        """The result of a sequence that is computed; its parts are forgotten."""
        result = _whole(sequence.request.wants, self._parts.pop(sequence), sequence.num_prompt_tokens)
        return Numbers.of(result.numpy())

    def forget(self, sequence: Sequence) -> None:
        self._parts.pop(sequence, None)


def _parts(model: CausalLM, wants: Wants, members: _Members) -> Iterable[Tensor]:
    match wants:
        case "hidden_states":
            return [rows.to("cpu", torch.float32, copy=True) for _, rows in members]
        case "last_hidden_state":
            return torch.stack([rows[-1] for _, rows in members]).float().cpu()
        case "mean_hidden_state":
            return torch.stack([rows.sum(dim=0, dtype=torch.float32) for _, rows in members]).cpu()
        case "token_logprobs":
            return _logprobs(model, members)
        case "label_logits":
            return model.label_logits(torch.stack([rows[-1] for _, rows in members])).float().cpu()
        case "token_label_logits" | "span_logits":
            logits = model.label_logits(torch.cat([rows for _, rows in members])).float().cpu()  # [*, L]
            return torch.split(logits, [len(rows) for _, rows in members])
    raise AssertionError(f"{wants} is no result of numbers")


def _logprobs(model: CausalLM, members: _Members) -> Iterable[Tensor]:
    """Of each row's next token; the prompt's last row has none. [t], or [t, 2 + 2n] with the n likeliest tokens."""
    targets = [_next_tokens(scheduled) for scheduled, _ in members]
    sizes = [len(tokens) for tokens in targets]
    wanted = [min(s.sequence.request.params.logprobs or 0, model.vocab_size) for s, _ in members]
    most = max(wanted)
    rows = torch.cat([rows[:size] for (_, rows), size in zip(members, sizes, strict=True)])
    next_tokens = torch.tensor([token for tokens in targets for token in tokens], device=rows.device)
    owners = [s.sequence.adapter for (s, _), size in zip(members, sizes, strict=True) for _ in range(size)]
    found = [torch.empty(0, 2 + 2 * most, device=rows.device)]
    for first in range(0, len(rows), LOGIT_ROWS):
        part, of_part = rows[first : first + LOGIT_ROWS], owners[first : first + LOGIT_ROWS]
        logits = model.logits(part, head_adapters(of_part, [1] * len(part), rows.device))
        found.append(_of_next(logits.float(), next_tokens[first : first + LOGIT_ROWS], most))
    every = torch.split(torch.cat(found).cpu(), sizes)
    return [_columns(part, num, most) for part, num in zip(every, wanted, strict=True)]


def _of_next(logits: Tensor, tokens: Tensor, num_top: int) -> Tensor:
    """[R, 2 + 2n]: each token's log-probability, its rank from 1, the likeliest tokens' ids, their log-probabilities.

    logits: [R, V] float32.  Ids are exact in float32 up to 2^24.
    """
    chosen, total = logits.gather(1, tokens[:, None]), logits.logsumexp(dim=-1, keepdim=True)
    ranks = torch.ones_like(chosen)
    if num_top:
        ranks += (logits > chosen).sum(dim=-1, keepdim=True)
    values, ids = logits.topk(num_top)
    return torch.cat([chosen - total, ranks, ids.float(), values - total], dim=1)


def _columns(part: Tensor, num: int, most: int) -> Tensor:
    """One member's part, of the members' [t, 2 + 2 * most]."""
    if not num:
        return part[:, 0]
    return torch.cat([part[:, : 2 + num], part[:, 2 + most : 2 + most + num]], dim=1)


def _next_tokens(scheduled: ScheduledSequence) -> list[int]:
    first = scheduled.sequence.num_computed_tokens
    return scheduled.sequence.token_ids[first + 1 : first + scheduled.num_tokens + 1]


def _whole(wants: Wants, parts: Seq[Tensor], num_tokens: int) -> Tensor:
    if wants in ("last_hidden_state", "label_logits"):
        return parts[-1]
    if wants == "mean_hidden_state":
        return torch.stack(list(parts)).sum(dim=0) / num_tokens
    return torch.cat(list(parts))


def _is_sound(part: Tensor, sequence: Sequence) -> bool:
    """Whether a part may be given. A log-probability of minus infinity is a probability of 0."""
    if sequence.keeps_non_finite:
        return True
    unsound = part.isnan() if sequence.request.wants == "token_logprobs" else ~part.isfinite()
    return not bool(unsound.any())
