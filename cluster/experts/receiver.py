"""Waits for one leg's answer, and asks other copies too when it is late. Knows `ShardCalls`; knows no carrier.

R: rows of a leg, H: hidden size.
"""

import logging
from math import inf

import torch
from torch import Tensor

from cluster.experts.calls import RETRY_INTERVAL_S, SIGN_S, ShardCalls
from cluster.experts.deadline import Deadline
from cluster.experts.legs import Leg, Losses, add_rows

log = logging.getLogger(__name__)

TURN_S = 0.01  # how long a hedged call waits at one of its copies before it looks at the other


class Receiver:
    """Used by one thread."""

    def __init__(self, calls: ShardCalls) -> None:
        self._calls = calls
        self._clock = calls.clock

    def receive(self, leg: Leg, search: Deadline, losses: Losses | None = None) -> Tensor | None:
        """Blocks for one leg's rows: [R, H] float32, or None when they have to be sent again.

        search: by when rows have to find a living copy.  losses: where rows may be lost, silent shards are waited for
        once in a step, and shorter if they were silent in a step before.
        """
        calls = self._calls
        if losses is not None and (leg.batch.epoch, leg.shard_id) in losses.hung:
            calls.give_up(leg)
            return None
        num_silences = calls.routing.num_silences(leg.shard_id) if losses is not None else 0
        silence_s = calls.patience.silence_s(num_silences)
        # An answer may have come while another leg was waited for: there is always the time to read it.
        lost = search.earlier(max(leg.sent_at + silence_s, self._clock() + SIGN_S))
        value = self._wait(leg, lost, silence_s, search)
        if value is None:
            silent = leg.flight is not None and lost.is_over
            calls.give_up(leg, silent=silent)
            if silent and losses is not None:
                losses.hung.add((leg.batch.epoch, leg.shard_id))
        return value

    def _wait(self, leg: Leg, lost: Deadline, silence_s: float, search: Deadline) -> Tensor | None:
        """Blocks until the rows come, the call fails or is outdated, or `lost` is over.

        Each sign of work moves `lost` to silence_s later.
        """
        calls = self._calls
        late = Deadline.after(self._clock, calls.patience.late_s(leg.num_rows))
        while leg.flight is not None and (now := self._clock()) < lost.at:
            if now >= late.at:
                late.at = inf  # asked once
                if self._can_hedge(leg):
                    return self._hedge(leg, search)
            if calls.is_outdated(leg, now):
                return None
            value = calls.ask(leg, min(late.at, lost.at, now + RETRY_INTERVAL_S) - now)
            if value is not None:
                return value
            if calls.hear(leg, search):
                lost.at = leg.heard_at + silence_s
        return None

    def _can_hedge(self, leg: Leg) -> bool:
        """Whether other copies could compute all of its rows, and hedges are not used up."""
        calls = self._calls
        return calls.patience.allows_hedge and calls.routing.can_do_without(leg.shard_id, leg.batch)

    def _hedge(self, late: Leg, search: Deadline) -> Tensor | None:
        """Asks other copies too, and takes what is whole first: [R, H] float32; None when neither comes."""
        calls, batch = self._calls, late.batch
        calls.patience.hedged()
        calls.metrics.hedged(late.shard_id)
        log.info("shard %d is late at layer %d; asking its other copies", late.shard_id, batch.layer_id)
        others = calls.send(
            batch.layer_id, batch.hidden_states, batch.topk_ids, batch.topk_weights, avoid=frozenset({late.shard_id})
        )
        value = self._first(late, others, search)
        for other in others:
            other.abandon()
        return value

    def _first(self, late: Leg, others: list[Leg], search: Deadline) -> Tensor | None:
        """The late leg's rows or the sum of the others', whichever is whole first: [R, H] float32. None if neither can
        come any more, or if all were silent for shard_timeout_s."""
        calls = self._calls
        values: dict[int, Tensor] = {}
        silent = search.earlier(self._clock() + calls.shard_timeout_s)
        while not silent.is_over and (late.flight or all(o.flight or i in values for i, o in enumerate(others))):
            for i, other in enumerate(others):
                if i not in values and (value := calls.ask(other, TURN_S)) is not None:
                    values[i] = value.clone()  # the carrier may use its memory again
            if len(values) == len(others):
                calls.give_up(late)
                return _sum(late, others, values)
            value = calls.ask(late, TURN_S if not any(other.flight for other in others) else 0.0)
            if value is not None:
                return value
            heard = [calls.hear(leg, search) for leg in (late, *others)]
            if any(heard):
                silent.at = self._clock() + calls.shard_timeout_s
        return None


def _sum(like: Leg, legs: list[Leg], values: dict[int, Tensor]) -> Tensor:
    """In the legs' order, whatever came first."""
    rows = like.batch.hidden_states
    out = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
    for i, leg in enumerate(legs):
        add_rows(out, leg.rows, values[i])
    return out
