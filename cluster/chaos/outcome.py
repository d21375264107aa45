"""A run of chaos in figures, and how it is printed."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.chaos.traffic import Reply

if TYPE_CHECKING:
    from cluster.chaos.faults import Recovery


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Of a run of chaos. different: answers with another token or text than without faults.

    stall: the longest wait between two pieces of an answer; gap: 99 % of them are shorter. In seconds.
    """

    requests: int
    failed: int
    different: int
    faults: dict[str, int]
    worst_stall_s: float
    quiet_stall_s: float
    gap_s: float
    quiet_gap_s: float
    worst_recovery_s: float
    seconds: float
    errors: tuple[str, ...]
    log: tuple[str, ...]

    @property
    def lossless(self) -> bool:
        return not self.failed and not self.different


def outcome_of(
    quiet: Sequence[Reply], asked: Sequence[tuple[int, Reply]], recoveries: Sequence["Recovery"], started: float
) -> Outcome:
    """quiet: a reply to each question.  asked: (number of the question, reply) under faults."""
    different = [reply for question, reply in asked if not reply.error and not reply.says_the_same(quiet[question])]
    gaps = [gap for _, reply in asked for gap in reply.gaps_s]
    quiet_gaps = [gap for reply in quiet for gap in reply.gaps_s]
    failed = [reply.error for _, reply in asked if reply.error]
    return Outcome(
        requests=len(asked),
        failed=len(failed),
        different=len(different),
        faults=dict(Counter(fault.kind for fault in recoveries)),
        worst_stall_s=max(gaps, default=0.0),
        quiet_stall_s=max(quiet_gaps, default=0.0),
        gap_s=_percentile(gaps, 0.99),
        quiet_gap_s=_percentile(quiet_gaps, 0.99),
        worst_recovery_s=max((fault.recovered_s for fault in recoveries), default=0.0),
        seconds=time.monotonic() - started,
        errors=tuple(sorted(set(failed))[:10]),
        log=tuple(f"{fault.at - started:.1f} s {fault.kind}: {fault.what}" for fault in recoveries),
    )


def _percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def print_outcome(outcome: Outcome, dtype: str) -> None:
    print(f"\nfaults            {sum(outcome.faults.values())}")
    for kind, count in outcome.faults.items():
        print(f"  {kind:16}{count}")
    print(f"requests          {outcome.requests} in {outcome.seconds:.0f} s")
    print(f"failed            {outcome.failed}")
    print(f"different         {outcome.different}")
    print(f"worst stall       {outcome.worst_stall_s:.2f} s (without faults {outcome.quiet_stall_s:.2f} s)")
    print(f"99 % of gaps      {outcome.gap_s:.3f} s (without faults {outcome.quiet_gap_s:.3f} s)")
    print(f"worst recovery    {outcome.worst_recovery_s:.1f} s, until every process was there again")
    for error in outcome.errors:
        print(f"error             {error}")
    if dtype != "float32":
        print(f"The model runs in {dtype}: sums in another order round differently; compare answers in float32.")
