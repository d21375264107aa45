"""From logits to tokens. Knows no scheduler; remembers, for each sequence with penalties, which tokens it has.

Every row is computed from its own logits, parameters and seed alone, so a sequence samples the same tokens whatever
else is in the batch. B: rows, V: vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cluster.errors import InvalidRequest
from cluster.kernels.sampling.choose import choose
from cluster.kernels.sampling.rule import NO_IDS, NONE_LEFT, NOT_FINITE, PLAIN, Chosen, Ids, Mask, Rule, bits
from cluster.model.penalties import PenaltyState, check_ids
from cluster.types import Logprobs, SamplingParams

Sampled = tuple[int, Logprobs | None]


class NoFiniteNumbers(ArithmeticError):
    """A row's largest number is NaN or infinite: the model has no answer for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRow:
    """The sampler's view of one sequence.

    token_ids: prompt and output so far.  params: every default filled in, the seed too.
    ahead: output tokens that are taken to follow these, before the row's own.
    banned_token_ids: not to be chosen (the ends of a sequence below min_tokens).  penalties: kept by the sequence.
    allowed: of the sequence's grammar, None for every token.
    """

    token_ids: Sequence[int]
    num_prompt_tokens: int
    params: SamplingParams
    penalties: PenaltyState
    ahead: tuple[int, ...] = ()
    banned_token_ids: tuple[int, ...] = ()
    allowed: Mask | None = None


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[Sampled | Exception]:
    """Chooses one token a row. logits: [B, V] in the model's dtype.

    Returns the tokens and, where asked for, log-probabilities under the model's own distribution; for a row that fails
    its exception, NoFiniteNumbers where the largest logit is none.
    """
    biased = [i for i, row in enumerate(rows) if row.params.biases]
    tokens = _sample(logits, rows)
    for i in biased:
        try:
            tokens[i] = _sample_biased(logits[i : i + 1], rows[i])
        except Exception as error:  # noqa: BLE001 it is this row's alone: the others have their tokens
            tokens[i] = error
    return tokens


def _sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[Sampled | Exception]:
    rules: list[Rule] = []
    failed: dict[int, Exception] = {}
    for i, row in enumerate(rows):
        try:
            rules.append(rule_of(row, logits.shape[1]))
        except Exception as error:  # noqa: BLE001 it is this row's alone: the others have their tokens
            rules.append(PLAIN)
            failed[i] = error
    try:
        tokens = _tokens(choose(logits, rules), rules)
    except Exception as error:  # noqa: BLE001 of one row, and nobody knows which
        tokens = [error] if len(rows) == 1 else [_sample(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    return [failed.get(i, token) for i, token in enumerate(tokens)]


def _sample_biased(logits: Tensor, row: SamplingRow) -> Sampled | Exception:
    """A row whose logits change before its token is chosen; its log-probabilities are the model's all the same.

    logits: [1, V].
    """
    plain_logits = logits.float()
    pairs = row.params.biases
    ids = torch.tensor([token_id for token_id, _ in pairs], device=logits.device)
    bias = torch.tensor([[value for _, value in pairs]], dtype=torch.float32, device=logits.device)
    rule = rule_of(row, logits.shape[1])
    if rule.allowed is not None:
        forbidden = torch.from_numpy(~bits(rule.allowed, logits.shape[1])).to(logits.device)
        plain_logits = plain_logits.masked_fill(forbidden, -math.inf)
    plain = rule._replace(num_top=-1)
    [chosen] = _tokens(choose(plain_logits.index_add(1, ids, bias), [plain]), [plain])
    if isinstance(chosen, Exception) or rule.num_top < 0:
        return chosen
    top_rule = PLAIN._replace(num_top=rule.num_top, allowed=rule.allowed)
    [likeliest] = _tokens(choose(plain_logits, [top_rule]), [top_rule])
    if isinstance(likeliest, Exception) or likeliest[1] is None:
        return likeliest
    token_id, top = chosen[0], likeliest[1].top
    logprob = float(
        plain_logits[0].double().log_softmax(dim=-1)[token_id].float()
    )  # as `kernels/sampling/reference.py`
    return token_id, Logprobs(token_id, dict(top).get(token_id, logprob), top)


def rule_of(row: SamplingRow, vocab_size: int) -> Rule:
    """How the row's token is chosen. Raises InvalidRequest where the parameters leave no token."""
    params, banned = row.params, row.banned_token_ids
    greedy = params.greedy
    if greedy and params.logprobs is None and not banned and not params.has_penalties and row.allowed is None:
        return PLAIN
    if banned:
        check_ids(banned, vocab_size)
        if len(banned) >= vocab_size:
            raise _no_token_left()
    assert greedy or params.temperature, "a temperature of 0 is greedy"
    ids, counts = penalties_of(row, vocab_size) if params.has_penalties else (NO_IDS, NO_IDS)
    return Rule(
        temperature=0.0 if greedy else params.temperature or 0.0,
        top_k=params.top_k or 0,
        top_p=params.top_p or 1.0,
        max_distance=-math.log(params.min_p) if params.min_p else math.inf,
        repetition=params.repetition_penalty or 1.0,
        presence=params.presence_penalty or 0.0,
        frequency=params.frequency_penalty or 0.0,
        num_top=-1 if params.logprobs is None else params.logprobs,
        seed=params.seed or 0,
        position=len(row.token_ids) + len(row.ahead),
        ids=ids,
        counts=counts,
        banned=np.array(banned, dtype=np.int32) if banned else NO_IDS,
        allowed=row.allowed,
    )


def penalties_of(row: SamplingRow, vocab_size: int) -> tuple[Ids, Ids]:
    """The row's distinct tokens and how often each is in its output, those of the last step and those ahead too."""
    row.penalties.extend(row.token_ids, row.num_prompt_tokens, vocab_size)
    return row.penalties.ahead(row.ahead) if row.ahead else (row.penalties.ids, row.penalties.counts)


def _tokens(chosen: Chosen, rules: Sequence[Rule]) -> list[Sampled | Exception]:
    return [_token(chosen, i, rule) for i, rule in enumerate(rules)]


def _token(chosen: Chosen, row: int, rule: Rule) -> Sampled | Exception:
    token_id = chosen.token_ids[row]
    if token_id == NOT_FINITE:
        return NoFiniteNumbers("the largest logit is NaN or infinite")
    if token_id == NONE_LEFT:
        return _no_token_left()
    if rule.num_top < 0:
        return token_id, None
    return token_id, _logprobs(chosen, row, rule)


def _logprobs(chosen: Chosen, row: int, rule: Rule) -> Logprobs:
    ids, values = chosen.top_ids[row][: rule.num_top], chosen.top_logprobs[row][: rule.num_top]
    pairs = zip(ids, values, strict=True)
    # A grammar may allow fewer tokens than are wanted; JSON has no -inf either.
    top = tuple(pairs) if rule.allowed is None else tuple(pair for pair in pairs if pair[1] > -math.inf)
    return Logprobs(chosen.token_ids[row], chosen.logprobs[row], top)


def _no_token_left() -> InvalidRequest:
    return InvalidRequest(
        "min_tokens leaves no token to choose: every token of the vocabulary ends the answer", "min_tokens"
    )
